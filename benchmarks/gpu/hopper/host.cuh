// Host side of the tests: device memory, launches, times, bf16 numbers.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "test.cuh"

namespace hopper {

// Device memory, zeroed; never freed, since every test is a process of its own.
template <typename Value>
Value* allocate(size_t count) {
  void* pointer = nullptr;
  CHECK(cudaMalloc(&pointer, count * sizeof(Value)));
  CHECK(cudaMemset(pointer, 0, count * sizeof(Value)));
  return static_cast<Value*>(pointer);
}
template <typename Value>
Value* upload(const std::vector<Value>& values) {
  Value* pointer = allocate<Value>(values.size());
  CHECK(cudaMemcpy(pointer, values.data(), values.size() * sizeof(Value), cudaMemcpyHostToDevice));
  return pointer;
}
template <typename Value>
std::vector<Value> download(const Value* pointer, size_t count) {
  std::vector<Value> values(count);
  CHECK(cudaMemcpy(values.data(), pointer, count * sizeof(Value), cudaMemcpyDeviceToHost));
  return values;
}

inline int attribute(cudaDeviceAttr which) {
  int value = 0;
  CHECK(cudaDeviceGetAttribute(&value, which, 0));
  return value;
}
inline int multiprocessors() {
  return attribute(cudaDevAttrMultiProcessorCount);
}

// So much dynamic shared memory, in bytes, that only one CTA fits on a multiprocessor.
constexpr int kOneCta = 150 * 1024;

// How to launch a kernel: its size, and attributes other than the defaults.
struct Launch {
  int ctas = 1, threads = 128, shared = 0, cluster = 1;
  bool cooperative = false, dependent = false;
  cudaStream_t stream = nullptr;
};

// A Launch in the form that the CUDA runtime takes. Not copyable, since `config` points to `attributes`.
struct Configuration {
  cudaLaunchAttribute attributes[3];
  cudaLaunchConfig_t config{};

  template <typename... Params>
  Configuration(const Launch& how, void (*kernel)(Params...)) {
    if (how.shared > 48 * 1024)
      CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 how.shared));
    config.gridDim = dim3(unsigned(how.ctas));
    config.blockDim = dim3(unsigned(how.threads));
    config.dynamicSmemBytes = size_t(how.shared);
    config.stream = how.stream;
    config.attrs = attributes;
    if (how.cluster > 1) {
      attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
      attributes[config.numAttrs].val.clusterDim.x = unsigned(how.cluster);
      attributes[config.numAttrs].val.clusterDim.y = 1;
      attributes[config.numAttrs++].val.clusterDim.z = 1;
    }
    if (how.cooperative) {
      attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
      attributes[config.numAttrs++].val.cooperative = 1;
    }
    if (how.dependent) {
      attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
  }
  Configuration(const Configuration&) = delete;
};

template <typename... Params, typename... Arguments>
void launch(const Launch& how, void (*kernel)(Params...), Arguments... arguments) {
  const Configuration configuration(how, kernel);
  CHECK(cudaLaunchKernelEx(&configuration.config, kernel, Params(arguments)...));
}

// How many CTAs the whole GPU can run at once, in clusters of how.cluster.
template <typename... Params>
int resident_ctas(const Launch& how, void (*kernel)(Params...)) {
  const Configuration configuration(how, kernel);
  int count = 0, each = how.cluster;
  if (how.cluster > 1) {
    CHECK(cudaOccupancyMaxActiveClusters(&count, kernel, &configuration.config));
  } else {  // without a cluster cudaOccupancyMaxActiveClusters may return 0
    CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, how.threads, size_t(how.shared)));
    each = multiprocessors();
  }
  if (count == 0) throw std::runtime_error("no cluster of " + std::to_string(how.cluster) + " CTAs fits on this GPU");
  return count * each;
}

// The median time of several runs after a warm-up, in milliseconds.
template <typename Run>
double median_ms(Run run, int repeats = 5, cudaStream_t stream = nullptr) {
  cudaEvent_t start, stop;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&stop));
  std::vector<float> times;
  for (int repeat = -1; repeat < repeats; ++repeat) {
    CHECK(cudaEventRecord(start, stream));
    run();
    CHECK(cudaEventRecord(stop, stream));
    CHECK(cudaEventSynchronize(stop));
    CHECK(cudaGetLastError());
    float time = 0;
    CHECK(cudaEventElapsedTime(&time, start, stop));
    if (repeat >= 0) times.push_back(time);
  }
  CHECK(cudaEventDestroy(start));
  CHECK(cudaEventDestroy(stop));
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

// The mean of `count` values in device memory.
inline double mean(const long long* device, int count) {
  double sum = 0;
  for (long long value : download(device, size_t(count))) sum += double(value);
  return sum / count;
}

// bf16 as its 16 bits; rounds to nearest even.
inline uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
inline double from_bf16(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return double(value);
}
// Values in [-1, 1), the same in every run.
inline std::vector<uint16_t> random_bf16(size_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::vector<uint16_t> values(count);
  for (uint16_t& value : values) value = to_bf16(float(int(generator() >> 8) - (1 << 23)) / float(1 << 23));
  return values;
}

}  // namespace hopper
