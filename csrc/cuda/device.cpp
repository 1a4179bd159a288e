#include "cuda/device.h"

#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

#include <array>
#include <atomic>
#include <map>
#include <mutex>

#include "cuda/kernels/driver.h"

namespace lowrank_ops {
namespace {

// -1 where the driver does not say.
int64_t attribute(int index, cudaDeviceAttr name) {
  int value = -1;
  if (cudaDeviceGetAttribute(&value, name, index) == cudaSuccess) return value;
  cudaGetLastError();  // clears the error, which the check after the next launch would find
  return -1;
}

GpuCaps read_caps(int index) {
  GpuCaps caps;
  cudaDeviceProp properties{};
  if (cudaGetDeviceProperties(&properties, index) == cudaSuccess)
    caps.name = properties.name;
  else
    cudaGetLastError();
  caps.architecture = int(10 * attribute(index, cudaDevAttrComputeCapabilityMajor) +
                          attribute(index, cudaDevAttrComputeCapabilityMinor));
  caps.multiprocessors = int(attribute(index, cudaDevAttrMultiProcessorCount));
  caps.shared_bytes_cta = attribute(index, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  caps.shared_bytes_multiprocessor = attribute(index, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  caps.l2_bytes = attribute(index, cudaDevAttrL2CacheSize);
  // kHz; two transfers per clock. For MIG slices and virtual GPUs the driver reports the bandwidth of the whole board.
  const double memory_clock = double(attribute(index, cudaDevAttrMemoryClockRate)) * 1e3;
  caps.memory_bytes_per_second = 2 * memory_clock * double(attribute(index, cudaDevAttrGlobalMemoryBusWidth)) / 8;
  fill_rates(caps, double(attribute(index, cudaDevAttrClockRate)) * 1e3);
  caps.built_for = {LOWRANK_OPS_CUDA_ARCHITECTURES};
  caps.built_ptx = LOWRANK_OPS_CUDA_PTX;
  caps.tensor_maps = driver_function("cuTensorMapEncodeTiled") != nullptr;
  return caps;
}

}  // namespace

std::optional<GpuCaps> present_gpu(int index) {
  static std::mutex mutex;
  static std::map<int, GpuCaps> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(index);
  if (found != known.end()) return found->second;
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || index < 0 || index >= count) {
    cudaGetLastError();
    return std::nullopt;
  }
  return known.emplace(index, read_caps(index)).first->second;
}

const GpuCaps& gpu_caps(c10::Device device) {
  static std::array<std::atomic<const GpuCaps*>, kMostDevices> cache{};
  const int index = device.index();
  TORCH_CHECK(index >= 0 && index < kMostDevices, "lowrank_ops: cannot use ", device, ": no GPU of that number");
  const GpuCaps* caps = cache[size_t(index)].load(std::memory_order_acquire);
  if (caps) return *caps;
  const std::optional<GpuCaps> read = present_gpu(index);
  TORCH_CHECK(read, "lowrank_ops: the CUDA runtime ", LOWRANK_OPS_CUDA_TOOLKIT,
              " that this build was linked with does not see ", device,
              ", which torch uses: the driver may be older than that runtime. Reinstall lowrank_ops with the CUDA "
              "toolkit of this torch, or use policy 'chain'");
  caps = new GpuCaps(*read);  // for the life of the process; where two threads make one at once, one is lost
  cache[size_t(index)].store(caps, std::memory_order_release);
  return *caps;
}

cudaStream_t current_stream(c10::Device device) {
  const c10::impl::VirtualGuardImpl guard(device.type());
  return static_cast<cudaStream_t>(guard.getStream(device).native_handle());
}

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(stream, &status) == cudaSuccess) return status != cudaStreamCaptureStatusNone;
  cudaGetLastError();  // the default stream cannot be queried while another one captures
  return true;
}

std::string describe(cudaError_t error) {
  return std::string(cudaGetErrorName(error)) + " (" + cudaGetErrorString(error) + ")";
}

}  // namespace lowrank_ops
