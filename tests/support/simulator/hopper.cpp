// The launchers of the sm90a kernels on a CPU, on the emulator of emulator.h.
#include <array>
#include <string>

#include "cuda/kernels/cp_sm90a_launch.cuh"
#include "cuda/kernels/linear_sm90a_launch.cuh"
#include "cuda/kernels/tucker_sm90a_launch.cuh"
#include "cuda/kernels/tucker_wide_sm90a_launch.cuh"
#include "module.h"

namespace lowrank_ops {
namespace hopper {

inline bool encode(CUtensorMap& map, const Boxes& boxes, DType) {
  map = {const_cast<unsigned char*>(static_cast<const unsigned char*>(boxes.data)), boxes.axes, {}, {}, {}};
  if (reinterpret_cast<uintptr_t>(boxes.data) % 16 != 0 || boxes.box[0] != 64) return false;
  for (int axis = 0; axis < 5; ++axis) {
    const bool used = axis < boxes.axes;
    map.sizes[axis] = used ? long(boxes.size[axis]) : 1;
    map.box[axis] = used ? boxes.box[axis] : 1;
    map.strides[axis] = used ? long(boxes.stride[axis]) * 2 : 0;
    const bool walked = used && axis > 0 && boxes.size[axis] > 1;
    if (walked && (map.strides[axis] <= 0 || map.strides[axis] % 16 != 0)) return false;
    if (map.box[axis] < 1 || map.box[axis] > 256) return false;
  }
  return true;
}

}  // namespace hopper

namespace {

// Two clusters, so that each has several of the `items`.
template <typename Params>
cudaError_t run_on_two(void (*kernel)(Params), int items, int threads, const Params& params, int cluster = 1) {
  const int ctas = least(items, 2 * cluster);
  const bool done = hopper::run_ctas(kernel, ctas, threads, params.layout.bytes, params, cluster);
  return done ? cudaSuccess : cudaErrorLaunchFailure;
}

cudaError_t launch_wide(const BlockParams& params, DType dtype) {
  hopper::WideParams to{};
  if (!hopper::wide_params(to, params, dtype)) return cudaErrorInvalidValue;
  return run_on_two(hopper::wide_kernel(to, dtype), to.tiles.count, TuckerWideSm90a::kThreads, to);
}

}  // namespace

cudaError_t launch_tucker_sm90a(const BlockParams& params, DType dtype, int config, cudaStream_t) {
  if (config == kSm90aWideConfig) return launch_wide(params, dtype);
  hopper::TuckerParams to{};
  if (config != kSm90aTuckerConfig || !hopper::tucker_params(to, params, dtype)) return cudaErrorInvalidValue;
  return run_on_two(hopper::tucker_kernel(to, dtype), to.tiles.count, TuckerSm90a::kThreads, to);
}

cudaError_t launch_cp_sm90a(const BlockParams& params, DType dtype, int config, cudaStream_t) {
  hopper::CpParams to{};
  if (config != kSm90aCpConfig || !hopper::cp_params(to, params, dtype)) return cudaErrorInvalidValue;
  const uintptr_t output = reinterpret_cast<uintptr_t>(to.output);
  hopper::writable = {output, output + 2 * uintptr_t(to.n) * to.height * to.width * to.t};
  return run_on_two(hopper::cp_kernel(to, dtype), to.tiles.count, CpSm90a::kThreads, to, to.cluster);
}

cudaError_t launch_linear_sm90a(const BlockParams& params, DType dtype, int config, cudaStream_t) {
  hopper::LinearParams to{};
  if (config != kSm90aLinearConfig || !hopper::linear_params(to, params, dtype)) return cudaErrorInvalidValue;
  return run_on_two(hopper::linear_kernel(to.layout, dtype), to.items, LinearSm90a::kThreads, to, to.cluster.divisor);
}

}  // namespace lowrank_ops

// The fault of the last launch, or "".
LOWRANK_OPS_EXPORT const char* hopper_fault() {
  return lowrank_ops::hopper::fault.c_str();
}
LOWRANK_OPS_EXPORT void hopper_mutate(const int64_t* v) {
  lowrank_ops::hopper::mutation = {int(v[0]), int(v[1]), int(v[2]), int(v[3]),  int(v[4]),  int(v[5]), int(v[6]),
                                   int(v[7]), int(v[8]), int(v[9]), int(v[10]), int(v[11]), int(v[12])};
}
// The bytes that TMA has read of a tensor in the last launch of an sm90a kernel.
LOWRANK_OPS_EXPORT int64_t hopper_loaded(int64_t tensor) {
  return lowrank_ops::hopper::loaded[reinterpret_cast<const void*>(tensor)];
}
