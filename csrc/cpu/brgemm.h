// GEMM through oneDNN's ukernels: `at::native::cpublas::brgemm`, the way to AMX. It is internal to torch and not a
// stable interface: this is the only file that calls it. Tried with torch 2.13.0 (fp32; the bf16 call needs an AMX
// machine).
#pragma once

#include <ATen/native/CPUBlas.h>

#include <cstring>
#include <type_traits>

#include "cpu/kernels/kernels.h"
#include "cpu/memory.h"

namespace lowrank_ops {

inline bool has_amx_brgemm() {
  return at::native::cpublas::could_pack(at::kBFloat16);
}

// Memory for the sums of a thread's current call, from its first GEMM to brgemm_release(). A count of 0 frees it.
inline float* brgemm_sums(int64_t count) {
  thread_local AlignedMemory sums;
  const int64_t bytes = count * int64_t(sizeof(float));
  if (bytes == 0)
    sums.reset();
  else if (!sums || sums.get_deleter().bytes < bytes)
    sums = allocate(bytes);
  return reinterpret_cast<float*>(sums.get());
}

// Runs a GemmCall through brgemm: sums of all taps in fp32, then bias, activation and conversion by `finish`. Weight
// panels have the layout of our own kernels: [depth][width] in fp32, [depth / 2][width][2] (VNNI) in bf16.
template <typename Element>
void brgemm_call(const GemmCall& call, FinishFunction finish) {
  constexpr int64_t kLanes = 16;
  constexpr bool kVnni = !std::is_same_v<Element, float>;
  const int64_t width = (call.width + kLanes - 1) / kLanes * kLanes;
  float* sums = brgemm_sums(call.rows * width);
  const Element* weight = static_cast<const Element*>(call.weight);
  const int64_t weight_stride = call.weight_columns > 0 ? call.weight_columns : width;
  if (call.initial)
    for (int64_t row = 0; row < call.rows; ++row)
      std::memcpy(sums + row * width, static_cast<const float*>(call.initial) + row * call.initial_stride,
                  size_t(width) * sizeof(float));
  for (int64_t tap = 0; tap < call.num_taps; ++tap, weight += call.depth * width) {
    if (call.tap_weights) weight = static_cast<const Element*>(call.tap_weights[tap]);
    at::native::cpublas::brgemm(call.rows, width, call.depth, call.row_stride, weight_stride, width,
                                /*add_C=*/tap > 0 || call.initial, static_cast<const Element*>(call.taps[tap]), weight,
                                sums, kVnni);
  }
  finish(sums, width, call);
}

// Gives the AMX tiles back to the system, and the sums to the thread's scratch memory. Called once, at the end of a
// thread's work.
inline void brgemm_release() {
  brgemm_sums(0);
  at::native::cpublas::brgemm_release(true);
}
// The same at the end of a scope, also when something in it throws.
struct BrgemmScope {
  ~BrgemmScope() { brgemm_release(); }
};

}  // namespace lowrank_ops
