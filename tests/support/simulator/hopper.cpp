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

// Two CTAs, so that each has several tiles.
template <typename Params>
cudaError_t run_on_two(void (*kernel)(Params), int threads, const Params& params) {
  const bool done = hopper::run_ctas(kernel, least(params.tiles.count, 2), threads, params.layout.bytes, params);
  return done ? cudaSuccess : cudaErrorLaunchFailure;
}

cudaError_t launch_wide(const BlockParams& params, DType dtype) {
  hopper::WideParams to{};
  if (!hopper::wide_params(to, params, dtype)) return cudaErrorInvalidValue;
  return run_on_two(hopper::wide_kernel(to, dtype), TuckerWideSm90a::kThreads, to);
}

}  // namespace

cudaError_t launch_tucker_sm90a(const BlockParams& params, DType dtype, int config, cudaStream_t) {
  if (config == kSm90aWideConfig) return launch_wide(params, dtype);
  hopper::TuckerParams to{};
  if (config != kSm90aTuckerConfig || !hopper::tucker_params(to, params, dtype)) return cudaErrorInvalidValue;
  return run_on_two(hopper::tucker_kernel(to, dtype), TuckerSm90a::kThreads, to);
}

cudaError_t launch_cp_sm90a(const BlockParams& params, DType dtype, int config, cudaStream_t) {
  hopper::CpParams to{};
  if (config != kSm90aCpConfig || !hopper::cp_params(to, params, dtype)) return cudaErrorInvalidValue;
  return run_on_two(hopper::cp_kernel(to, dtype), CpSm90a::kThreads, to);
}

cudaError_t launch_linear_sm90a(const BlockParams& params, DType dtype, int config, cudaStream_t) {
  hopper::LinearParams to{};
  if (config != kSm90aLinearConfig || !hopper::linear_params(to, params, dtype)) return cudaErrorInvalidValue;
  const bool done = hopper::run_ctas(hopper::linear_kernel(to.layout, dtype), least(to.items, 2), LinearSm90a::kThreads,
                                     to.layout.bytes, to);
  return done ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace lowrank_ops

// The fault of the last launch, or "".
LOWRANK_OPS_EXPORT const char* hopper_fault() {
  return lowrank_ops::hopper::fault.c_str();
}
LOWRANK_OPS_EXPORT void hopper_mutate(const int64_t* values) {
  lowrank_ops::hopper::mutation = {int(values[0]), int(values[1]), int(values[2]),
                                   int(values[3]), int(values[4]), int(values[5])};
}
