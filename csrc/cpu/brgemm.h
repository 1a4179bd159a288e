// GEMM through oneDNN's ukernels: `at::native::cpublas::brgemm`, the way to AMX. It is internal to torch and not a
// stable interface: this is the only file that calls it. Tried with torch 2.13.0 (fp32; the bf16 call needs an AMX
// machine).
#pragma once

#include <ATen/native/CPUBlas.h>

#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/kernels/kernels.h"

namespace lowrank_ops {

inline bool has_amx_brgemm() {
  return at::native::cpublas::could_pack(at::kBFloat16);
}

// A GemmCall through brgemm: sums of all taps in fp32, then the epilogue of `finish`. Weight panels have the layout of
// our own kernels: [depth][width] in fp32, [depth / 2][width][2] (VNNI) in bf16.
template <typename Element>
void brgemm_call(const GemmCall& call, FinishFunction finish) {
  constexpr int64_t kLanes = 16;
  constexpr bool kVnni = !std::is_same_v<Element, float>;
  const int64_t width = (call.width + kLanes - 1) / kLanes * kLanes;
  thread_local std::vector<float> sums;
  sums.resize(size_t(call.rows * width));
  const Element* weight = static_cast<const Element*>(call.weight);
  const int64_t weight_stride = call.weight_columns > 0 ? call.weight_columns : width;
  if (call.initial)
    for (int64_t row = 0; row < call.rows; ++row)
      std::memcpy(&sums[size_t(row * width)], static_cast<const float*>(call.initial) + row * call.initial_stride,
                  size_t(width) * sizeof(float));
  for (int64_t tap = 0; tap < call.num_taps; ++tap, weight += call.depth * width) {
    if (call.tap_weights) weight = static_cast<const Element*>(call.tap_weights[tap]);
    at::native::cpublas::brgemm(call.rows, width, call.depth, call.row_stride, weight_stride, width,
                                /*add_C=*/tap > 0 || call.initial, static_cast<const Element*>(call.taps[tap]), weight,
                                sums.data(), kVnni);
  }
  finish(sums.data(), width, call);
}

// Gives the AMX tiles back to the system; once at the end of a thread's work.
inline void brgemm_release() {
  at::native::cpublas::brgemm_release(true);
}

}  // namespace lowrank_ops
