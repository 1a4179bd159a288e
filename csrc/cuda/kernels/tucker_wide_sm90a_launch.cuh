// Turns the parameters of a call into those of the wide sm90a Tucker kernel, and chooses the kernel's instance.
#pragma once

#include "cuda/kernels/tucker_sm90a_launch.cuh"
#include "cuda/kernels/tucker_wide_sm90a.cuh"

namespace lowrank_ops::hopper {

// False: the driver made no tensor maps for these tensors.
inline bool wide_params(WideParams& to, const BlockParams& block, DType dtype) {
  using L = TuckerWideSm90a;
  const L layout = wide_sm90a_layout(block.geometry);
  return tucker_params(to, block, dtype, layout, layout.r1_parts * L::kSlice, layout.r2_parts * L::kSlice);
}

using WideKernel = void (*)(WideParams);

// The instance for a call.
template <bool half, bool one_plane>
WideKernel wide_kernel(const TuckerWideSm90a& l) {
  if (l.r1_parts == 1)
    return l.r2_parts == 1 ? tucker_wide_sm90a_kernel<half, 1, 1, one_plane>
                           : tucker_wide_sm90a_kernel<half, 1, 2, one_plane>;
  return l.r2_parts == 1 ? tucker_wide_sm90a_kernel<half, 2, 1, one_plane>
                         : tucker_wide_sm90a_kernel<half, 2, 2, one_plane>;
}
inline WideKernel wide_kernel(const WideParams& p, DType dtype) {
  if (dtype == DType::kHalf)
    return has_one_plane(p) ? wide_kernel<true, true>(p.layout) : wide_kernel<true, false>(p.layout);
  return has_one_plane(p) ? wide_kernel<false, true>(p.layout) : wide_kernel<false, false>(p.layout);
}

}  // namespace lowrank_ops::hopper
