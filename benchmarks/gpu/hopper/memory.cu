// Bandwidth of L2 and of memory, and how fast cp.async can be issued.
#include <string>

#include "device.cuh"
#include "host.cuh"

namespace hopper {
namespace {

constexpr int kThreads = 512, kChunk = kThreads * 4;  // kChunk: vectors of 16 bytes per chunk

enum class Work { kRead, kWrite, kCopy };

// Reads or writes a buffer of `chunks` chunks of 32 KB again and again, `total` chunks in all. The CTAs take chunks in
// turn.
template <Work work>
__global__ void __launch_bounds__(kThreads)
    stream_kernel(const uint4* from, uint4* to, int chunks, int total, uint32_t* sink) {
  uint32_t sum = 0;
  for (int chunk = int(blockIdx.x); chunk < total; chunk += int(gridDim.x)) {
    const size_t start = size_t(chunk % chunks) * kChunk + threadIdx.x;
    uint4 value[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      value[i] = make_uint4(chunk, i, chunk, i);
      if constexpr (work != Work::kWrite)
        asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(value[i].x), "=r"(value[i].y), "=r"(value[i].z), "=r"(value[i].w)
                     : "l"(from + start + i * kThreads));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (work == Work::kRead)
        sum += value[i].x ^ value[i].y ^ value[i].z ^ value[i].w;
      else
        __stcs(to + start + i * kThreads, value[i]);
    }
  }
  if (sum == 0x5EED) *sink = sum;
}

// Reads a buffer in the same way, by cp.async to shared memory.
__global__ void __launch_bounds__(kThreads) stream_async_kernel(const uint4* from, int chunks, int total) {
  const uint32_t base = shared_base() + threadIdx.x * 16;
  int stage = 0;
  for (int chunk = int(blockIdx.x); chunk < total; chunk += int(gridDim.x)) {
    const uint4* start = from + size_t(chunk % chunks) * kChunk + threadIdx.x;
#pragma unroll
    for (int i = 0; i < 4; ++i) copy_async(base + stage * kChunk * 16 + i * kThreads * 16, start + i * kThreads);
    commit_copies();
    wait_copies<1>();
    stage ^= 1;
  }
  wait_copies<0>();
}

}  // namespace

void test_l2_bandwidth() {
  const int sms = multiprocessors();
  constexpr int kSmall = 640, kBig = 131072;  // chunks: 20 MB, 4 GB
  constexpr double kBytes = kChunk * 16.0;
  uint4* data = allocate<uint4>(size_t(kBig) * kChunk);
  uint32_t* sink = allocate<uint32_t>(1);
  const Launch how{sms * 4, kThreads};
  const auto figure = [&](const char* key, double bytes, auto run) {
    attempt(key, [&] { report.number(key, bytes / median_ms(run) * 1e-6); });
  };
  const int many = kSmall * 100;
  figure("l2_read_gbps", many * kBytes,
         [&] { launch(how, stream_kernel<Work::kRead>, data, data, kSmall, many, sink); });
  figure("l2_read_cp_async_gbps", many * kBytes,
         [&] { launch({sms * 3, kThreads, 2 * kChunk * 16}, stream_async_kernel, data, kSmall, many); });
  figure("l2_write_gbps", many * kBytes,
         [&] { launch(how, stream_kernel<Work::kWrite>, data, data, kSmall, many, sink); });
  figure("hbm_read_gbps", kBig * kBytes,
         [&] { launch(how, stream_kernel<Work::kRead>, data, data, kBig, kBig, sink); });
  figure("hbm_read_cp_async_gbps", kBig * kBytes,
         [&] { launch({sms * 3, kThreads, 2 * kChunk * 16}, stream_async_kernel, data, kBig, kBig); });
  figure("hbm_write_gbps", kBig * kBytes,
         [&] { launch(how, stream_kernel<Work::kWrite>, data, data, kBig, kBig, sink); });
  uint4* half = data + size_t(kBig) / 2 * kChunk;
  figure("hbm_copy_gbps_read_and_written", kBig * kBytes,
         [&] { launch(how, stream_kernel<Work::kCopy>, data, half, kBig / 2, kBig / 2, sink); });
  figure("hbm_memcpy_gbps_read_and_written", kBig * kBytes,
         [&] { CHECK(cudaMemcpyAsync(half, data, size_t(kBig) / 2 * kChunk * 16, cudaMemcpyDeviceToDevice)); });
  figure("hbm_memset_gbps", kBig * kBytes, [&] { CHECK(cudaMemsetAsync(data, 0, size_t(kBig) * kChunk * 16)); });
}

namespace {

// Only cp.async of 16 bytes: kCopies per thread and chunk, then a wait until at most kSlots - 1 chunks are still under
// way.
template <int kWarps, int kSlots, int kCopies>
__global__ void __launch_bounds__(kWarps * 32)
    copy_issue_kernel(const unsigned char* source, long long* clocks, int iterations) {
  constexpr int kStep = kWarps * 32 * 16, kStage = kStep * kCopies, kUnrolled = 6;  // a multiple of 2 and of 3 slots
  const uint32_t base = shared_base() + threadIdx.x * 16;
  // A CTA reads at most 1.5 MB again and again; the 24 MB of all CTAs stay in L2.
  const unsigned char* start = source + size_t(blockIdx.x) % 396 * 40960 + threadIdx.x * 16;
  __syncthreads();
  const long long begin = clock64();
#pragma unroll 1
  for (int iteration = 0; iteration < iterations; ++iteration) {
    const unsigned char* from = start + iteration % 8 * (kUnrolled * kStage);
#pragma unroll
    for (int chunk = 0; chunk < kUnrolled; ++chunk) {
#pragma unroll
      for (int i = 0; i < kCopies; ++i)
        copy_async(base + chunk % kSlots * kStage + i * kStep, from + chunk * kStage + i * kStep);
      commit_copies();
      wait_copies<kSlots - 1>();
    }
  }
  wait_copies<0>();
  __syncthreads();
  if (threadIdx.x == 0) clocks[blockIdx.x] = clock64() - begin;
}

template <int kWarps, int kSlots, int kCopies>
void copy_issue(const unsigned char* source, long long* clocks) {
  const int bytes = kWarps * 32 * 16 * kCopies * kSlots, sms = multiprocessors();
  for (int ctas : {1, 2, 3}) {
    const int shared = (ctas == 1 ? 200 : ctas == 2 ? 110 : 74) * 1024;  // exactly this many CTAs fit
    if (bytes > shared) continue;
    const std::string key = "warps" + std::to_string(kWarps) + "_stages" + std::to_string(kSlots) + "_copies" +
                            std::to_string(kCopies) + "_ctas" + std::to_string(ctas);
    attempt(key, [&] {
      const int iterations = 4096 / (kWarps * kCopies);
      const double instructions = double(iterations) * 6 * kCopies * kWarps * ctas;  // per multiprocessor
      const Launch how{sms * ctas, kWarps * 32, shared};
      const double ms =
          median_ms([&] { launch(how, copy_issue_kernel<kWarps, kSlots, kCopies>, source, clocks, iterations); });
      const double spent = mean(clocks, how.ctas);
      report.number(key + "_clk_per_instruction", spent / instructions);
      report.number(key + "_bytes_per_clk", instructions * 512 / spent);
      report.number(key + "_gbps", instructions * 512 * sms / ms * 1e-6);
    });
  }
}

}  // namespace

void test_cp_async_issue() {
  const unsigned char* source = allocate<unsigned char>(24 << 20);
  long long* clocks = allocate<long long>(1024);
  copy_issue<4, 2, 4>(source, clocks);
  copy_issue<4, 3, 4>(source, clocks);
  copy_issue<4, 2, 8>(source, clocks);
  copy_issue<4, 3, 8>(source, clocks);
  copy_issue<8, 2, 4>(source, clocks);
  copy_issue<8, 3, 4>(source, clocks);
  copy_issue<8, 2, 8>(source, clocks);
  copy_issue<8, 3, 8>(source, clocks);
}

}  // namespace hopper
