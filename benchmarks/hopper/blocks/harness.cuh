// Runs the variants of a block on the GPU, each in a process of its own (forked before any call of CUDA), against the
// reference, and prints a line of JSON each.
//
// Times, medians of single launches in us: flushed_us after writing 128 MB (which leaves L2 dirty),
// flushed_by_reading_us after reading them, back_to_back_us of 20 launches; empty_us is what a kernel that does nothing
// takes between two events. Errors are those of three whole images; `unstable` counts values that differ at the end
// from those of the first launch.
#pragma once

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "../host.cuh"
#include "numbers.cuh"

namespace hopper {

constexpr int kChecked[3] = {0, 13, 31};  // images
constexpr size_t kValues = kImages * kImageValues, kFlushBytes = size_t(128) << 20;

static __global__ void fill_kernel(uint16_t* values, uint32_t count) {
  for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x)
    values[i] = high_half(input_value(i));
}
static __global__ void empty_kernel() {}
static __global__ void read_kernel(const uint4* values, uint32_t count, uint32_t* sink) {
  uint32_t sum = 0;
  for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
    const uint4 value = values[i];
    sum += value.x ^ value.y ^ value.z ^ value.w;
  }
  if (sum == 0x5EED1234u) *sink = sum;
}

// The median time of a run, in us; `before` goes untimed before each.
template <typename Before, typename Run>
double median_us(int repeats, Before before, Run run) {
  cudaEvent_t start, stop;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&stop));
  std::vector<double> times;
  for (int i = -1; i < repeats; ++i) {
    before();
    CHECK(cudaEventRecord(start));
    run();
    CHECK(cudaEventRecord(stop));
    CHECK(cudaEventSynchronize(stop));
    CHECK(cudaGetLastError());
    float ms = 0;
    CHECK(cudaEventElapsedTime(&ms, start, stop));
    if (i >= 0) times.push_back(double(ms) * 1e3);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

template <typename Run>
void report_times(Run run, int sms) {
  uint32_t* flush = allocate<uint32_t>(kFlushBytes / 4);
  uint32_t* sink = allocate<uint32_t>(1);
  const auto write = [&] { CHECK(cudaMemsetAsync(flush, 1, kFlushBytes)); };
  const auto read = [&] {
    read_kernel<<<sms * 8, 256>>>(reinterpret_cast<const uint4*>(flush), uint32_t(kFlushBytes / 16), sink);
  };
  const double flushed = median_us(20, write, run);
  report.number("flushed_us", flushed);
  report.number("flushed_by_reading_us", median_us(10, read, run));
  const auto twenty = [&] {
    for (int i = 0; i < 20; ++i) run();
  };
  report.number("back_to_back_us", median_us(5, [] {}, twenty) / 20);
  report.number("empty_us", median_us(10, write, [&] { empty_kernel<<<sms, 128>>>(); }));
  report.number("flushed_tbps", 2.0 * kValues * 2 / flushed * 1e-6);
}

// Compares with the reference of the images kChecked; every value must have been written.
inline void report_errors(const std::vector<uint16_t>& output, const std::vector<float>& expected) {
  Errors errors;
  for (int i = 0; i < 3; ++i)
    for (size_t at = 0; at < kImageValues; ++at)
      errors.add(output[size_t(kChecked[i]) * kImageValues + at], expected[size_t(i) * kImageValues + at]);
  const auto unwritten = std::count(output.begin(), output.end(), uint16_t(0xFFFF));
  if (!errors.right() || unwritten > 0) report.wrong();
  report.number("max_error", errors.max_error());
  report.number("frobenius_error", errors.frobenius());
  report.number("differing", double(errors.differing));
  report.number("bad", double(errors.bad));
  report.number("of", double(errors.values));
  report.number("unwritten", double(unwritten));
}

// A profile: per warpgroup 8 numbers, clocks of five stages, of all, and how many tiles.
inline void report_profile(const uint32_t* profile, int groups) {
  const std::vector<uint32_t> laps = download(profile, size_t(groups) * 8);
  std::vector<double> sums(5);
  double tiles = 0, total = 0, longest = 0;
  for (size_t i = 0; i < laps.size(); i += 8) {
    for (size_t j = 0; j < 5; ++j) sums[j] += laps[i + j];
    total += laps[i + 5], longest = std::max(longest, double(laps[i + 5])), tiles += laps[i + 6];
  }
  for (double& sum : sums) sum /= tiles;
  report.list("clk_per_tile_wait_stage1_hidden_stage2_stage3", sums);
  report.number("clk_mean", total / groups);
  report.number("clk_longest", longest);
}

template <class Block>
void run_variant(const Variant<typename Block::Arguments>& what, const typename Block::Factors& factors,
                 const std::vector<float>& expected) {
  const int sms = multiprocessors();
  const void* kernel = reinterpret_cast<const void*>(what.kernel);
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, what.shared));
  uint16_t *input = allocate<uint16_t>(kValues), *output = allocate<uint16_t>(kValues);
  uint32_t* profile = allocate<uint32_t>(size_t(sms) * 4 * 8);
  CHECK(cudaMemset(output, 0xFF, kValues * 2));
  fill_kernel<<<sms * 8, 256>>>(input, uint32_t(kValues));
  const auto keep = [](const auto& values) { return upload(values); };
  const auto arguments = Block::arguments(factors, keep, input, output, kImages, profile);
  const auto run = [&] {
    what.kernel<<<sms, what.threads, what.shared>>>(arguments);
    CHECK(cudaGetLastError());
  };
  run();
  CHECK(cudaDeviceSynchronize());
  const std::vector<uint16_t> first = download(output, kValues);
  report_times(run, sms);
  if (what.right) {
    report_errors(first, expected);
    const std::vector<uint16_t> last = download(output, kValues);
    size_t unstable = 0;
    for (size_t i = 0; i < kValues; ++i) unstable += first[i] != last[i];
    report.number("unstable", double(unstable));
    if (unstable > 0) report.wrong();
  }
  if (what.profiled_groups > 0) report_profile(profile, sms * what.profiled_groups);
  cudaFuncAttributes attributes;
  CHECK(cudaFuncGetAttributes(&attributes, kernel));
  report.number("threads", what.threads);
  report.number("shared", what.shared);
  report.number("registers", attributes.numRegs);
  report.number("spilled_bytes", double(attributes.localSizeBytes));
}

inline double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

inline void report_failure(const char* name, const std::string& why) {
  Report failure(name);
  failure.text("error", why);
  failure.unfinished();
  failure.print();
}

// Runs the body in a child, as a fault, a hang or a broken context must cost this variant alone.
template <typename Body>
void run_in_child(const char* name, double seconds, Body body) {
  const auto start = std::chrono::steady_clock::now();
  const pid_t child = fork();
  if (child == 0) {
    report.begin(name);
    attempt("variant", body);
    report.print();
    _exit(0);
  }
  if (child < 0) return report_failure(name, "not started");
  int status = 0;
  for (bool killed = false; waitpid(child, &status, WNOHANG) == 0; usleep(1000)) {
    if (seconds_since(start) > seconds && !killed) {
      kill(child, SIGKILL);
      killed = true;
    }
    if (seconds_since(start) > seconds + 1) return report_failure(name, "stuck in the driver");
  }
  if (!WIFEXITED(status)) report_failure(name, "ended by signal " + std::to_string(WTERMSIG(status)));
}

// A context elsewhere keeps the driver awake between the variants. Ends when the pipe closes.
inline pid_t start_keeper(int (&ends)[2]) {
  if (pipe(ends) != 0) return -1;
  const pid_t child = fork();
  if (child != 0) {
    close(ends[0]);
    return child;
  }
  close(ends[1]);
  report.begin("device");
  attempt("device", [] {
    cudaDeviceProp properties;
    int driver = 0;
    CHECK(cudaGetDeviceProperties(&properties, 0));
    CHECK(cudaDriverGetVersion(&driver));
    report.text("name", properties.name);
    report.number("multiprocessors", properties.multiProcessorCount);
    report.number("clock_rate_khz", attribute(cudaDevAttrClockRate));
    report.number("driver", driver);
    if (attribute(cudaDevAttrComputeMode) == cudaComputeModeDefault) CHECK(cudaFree(nullptr));
  });
  report.print();
  char byte;
  while (read(ends[0], &byte, 1) > 0) {
  }
  _exit(0);
}

// The output of the images kChecked, in several threads.
template <class Block>
std::vector<float> reference_images(const typename Block::Factors& factors) {
  std::vector<float> expected(3 * kImageValues);
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i)
    for (int row = 0; row < kSize; row += 7)
      threads.emplace_back([&, i, row] {
        Block::reference(factors, kChecked[i], row, row + 7, expected.data() + size_t(i) * kImageValues);
      });
  for (std::thread& thread : threads) thread.join();
  return expected;
}

template <class Block>
int run_block(int count, char** arguments) {
  double seconds = 30;
  const char* prefix = "";
  const auto variants = Block::variants();
  for (int i = 1; i < count; ++i) {
    if (std::strcmp(arguments[i], "--list") == 0) {
      for (const auto& what : variants) std::printf("%s\n", what.name);
      return 0;
    }
    if (std::strcmp(arguments[i], "--seconds") == 0 && i + 1 < count)
      seconds = std::atof(arguments[++i]);
    else
      prefix = arguments[i];
  }
  const auto start = std::chrono::steady_clock::now();
  int ends[2] = {-1, -1};
  const pid_t keeper = start_keeper(ends);
  const typename Block::Factors factors;
  const std::vector<float> expected = reference_images<Block>(factors);
  for (const auto& what : variants) {
    if (std::strncmp(what.name, prefix, std::strlen(prefix)) != 0) continue;
    const double left = seconds - seconds_since(start);
    if (left < 0.7)
      report_failure(what.name, "skipped: no time left");
    else
      run_in_child(what.name, std::min(4.0, left), [&] { run_variant<Block>(what, factors, expected); });
  }
  close(ends[1]);
  if (keeper > 0) {
    for (int i = 0; i < 500 && waitpid(keeper, nullptr, WNOHANG) == 0; ++i) usleep(1000);
    kill(keeper, SIGKILL);
  }
  return 0;
}

}  // namespace hopper
