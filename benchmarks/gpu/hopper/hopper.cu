// Measures the properties of the hardware that kernels for Hopper rest on: matrix descriptors of wgmma with shifted
// starts, rates of the tensor cores, TMA, barriers, and memory. One program that needs nothing but CUDA:
//
//   nvcc -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a -o build/hopper benchmarks/gpu/hopper/*.cu
//   build/hopper [--seconds S] [NAME]    all tests, or those whose names begin with NAME; --list prints the names
//
// Every test runs in a process of its own, so that a fault or a hang costs that test alone, and prints one line of
// JSON. "ok" is true (results right, or all rates measured), false (wrong results) or null (not finished; the line has
// the results so far).
//
// Sources: PTX ISA 8.x, sections "Asynchronous warpgroup-level matrix instructions", "mbarrier", "cp.async.bulk".
#include <cuda_runtime.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>

#include "host.cuh"
#include "test.cuh"

namespace hopper {
namespace {

struct Test {
  const char* name;
  void (*run)();
};
const Test kTests[] = {{"wgmma_shifted", test_wgmma_shifted},
                       {"wgmma_swizzle_shifted", test_wgmma_swizzle_shifted},
                       {"wgmma_rate", test_wgmma_rate},
                       {"mma_rate", test_mma_rate},
                       {"tma_border", test_tma_border},
                       {"tma_rate", test_tma_rate},
                       {"latencies_grid", test_latencies_grid},
                       {"latencies_cluster", test_latencies_cluster},
                       {"latencies_mbarrier", test_latencies_mbarrier},
                       {"latencies_multicast", test_latencies_multicast},
                       {"latencies_launch", test_latencies_launch},
                       {"l2_bandwidth", test_l2_bandwidth},
                       {"cp_async_issue", test_cp_async_issue}};

// The time limit of one test.
constexpr double kTestSeconds = 8;

// In the child process: runs one test. Half a second before the parent would kill this process, a thread prints the
// results so far.
int run_test(const char* name, double seconds) {
  for (const Test& test : kTests) {
    if (std::strcmp(name, test.name) != 0) continue;
    report.begin(name);
    std::thread([seconds] {
      std::this_thread::sleep_for(std::chrono::duration<double>(std::max(0.1, seconds - 0.5)));
      report.text("error", "timed out");
      report.unfinished();
      report.print();
      _exit(3);
    }).detach();
    attempt("test", [&] {
      test.run();
      CHECK(cudaDeviceSynchronize());
    });
    report.print();
    _exit(0);  // without tearing down a context that may be broken
  }
  std::fprintf(stderr, "no test %s\n", name);
  return 2;
}

// Prints the line of a test that could not print it itself.
void print_failure(const char* name, const std::string& why) {
  std::printf("{\"test\": \"%s\", \"ok\": null, \"error\": \"%s\"}\n", name, why.c_str());
  std::fflush(stdout);
}

// In the parent: starts this program again for one test, and waits for it.
void run_in_child(const char* program, const char* name, double seconds) {
  const std::string limit = std::to_string(seconds);
  const char* arguments[] = {program, "--child", name, limit.c_str(), nullptr};
  pid_t child = 0;
  int error = posix_spawn(&child, "/proc/self/exe", nullptr, nullptr, const_cast<char**>(arguments), environ);
  if (error) error = posix_spawn(&child, program, nullptr, nullptr, const_cast<char**>(arguments), environ);
  if (error) return print_failure(name, std::string("not started: ") + std::strerror(error));
  const auto start = std::chrono::steady_clock::now();
  int status = 0;
  for (bool killed = false; waitpid(child, &status, WNOHANG) == 0; usleep(2000)) {
    const double passed = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (passed > seconds && !killed) {
      kill(child, SIGKILL);
      killed = true;
    }
    if (passed > seconds + 1) return print_failure(name, "stuck in the driver");
  }
  if (!WIFEXITED(status)) print_failure(name, "ended by signal " + std::to_string(WTERMSIG(status)));
}

void print_device() {
  report.begin("device");
  attempt("device", [] {
    cudaDeviceProp properties;
    int driver = 0, runtime = 0;
    CHECK(cudaGetDeviceProperties(&properties, 0));
    CHECK(cudaDriverGetVersion(&driver));
    CHECK(cudaRuntimeGetVersion(&runtime));
    report.text("name", properties.name);
    report.number("capability", properties.major * 10 + properties.minor);
    report.number("multiprocessors", properties.multiProcessorCount);
    report.number("clock_rate_khz", attribute(cudaDevAttrClockRate));
    report.number("memory_clock_khz", attribute(cudaDevAttrMemoryClockRate));
    report.number("l2_bytes", properties.l2CacheSize);
    report.number("memory_bytes", double(properties.totalGlobalMem));
    report.number("driver", driver);
    report.number("runtime", runtime);
    // A context in this process keeps the driver loaded between the tests' processes.
    if (attribute(cudaDevAttrComputeMode) == cudaComputeModeDefault) CHECK(cudaFree(nullptr));
  });
  report.print();
}

// Runs all tests whose names begin with `prefix`, in `seconds` altogether.
int run_tests(const char* program, const char* prefix, double seconds) {
  const auto start = std::chrono::steady_clock::now();
  print_device();
  int found = 0;
  for (const Test& test : kTests) {
    if (std::strncmp(test.name, prefix, std::strlen(prefix)) != 0) continue;
    ++found;
    const double passed = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (seconds - passed < 1)
      print_failure(test.name, "skipped: no time left");
    else
      run_in_child(program, test.name, std::min(kTestSeconds, seconds - passed));
  }
  if (!found) std::fprintf(stderr, "no test begins with %s\n", prefix);
  return found ? 0 : 2;
}

}  // namespace
}  // namespace hopper

int main(int count, char** arguments) {
  double seconds = 30;
  const char* prefix = "";
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    if (argument == "--child" && i + 2 < count) return hopper::run_test(arguments[i + 1], std::atof(arguments[i + 2]));
    if (argument == "--list") {
      for (const hopper::Test& test : hopper::kTests) std::printf("%s\n", test.name);
      return 0;
    }
    if (argument == "--seconds" && i + 1 < count)
      seconds = std::atof(arguments[++i]);
    else
      prefix = arguments[i];
  }
  return hopper::run_tests(arguments[0], prefix, seconds);
}
