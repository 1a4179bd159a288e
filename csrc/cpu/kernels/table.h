// Fills the KernelTable of one instruction set.
#pragma once

#include "cpu/kernels/depthwise.h"
#include "cpu/kernels/dot.h"
#include "cpu/kernels/gemm.h"
#include "cpu/kernels/pack.h"
#include "cpu/kernels/plane.h"
#include "cpu/kernels/tile.h"
#include "cpu/kernels/winograd.h"

namespace lowrank_ops {
namespace LOWRANK_ISA {

// Tables are indexed by DType: kFloat, kDouble, kBFloat16, kHalf.
static const ComputeKernels kComputeFloat = {
    DType::kFloat,
    DType::kFloat,
    Vector<float>::kLanes,
    kMaxVectors * Vector<float>::kLanes,
    1,
    Dot<float, float>::kBlock,
    &gemm<MultiplyFloat>,
    &depthwise<float, float>,
    {&load_tile<float, float>, nullptr, &load_tile<float, BFloat16>, &load_tile<float, Half>},
    {&store_transposed<float, float>, nullptr, &store_transposed<BFloat16, float>, &store_transposed<Half, float>},
    {&pack_panel<float, float>, nullptr, &pack_panel<float, BFloat16>, &pack_panel<float, Half>},
    {&dot<Dot<float, float>>, nullptr, &dot<Dot<float, BFloat16>>, &dot<Dot<float, Half>>},
    {&add_planes<float, float>, nullptr, &add_planes<float, BFloat16>, &add_planes<float, Half>},
    &plane_window<float>,
    {&spread_plane<float, float>, nullptr, &spread_plane<BFloat16, float>, &spread_plane<Half, float>},
    &finish_sums<float>,
    {{}, square_kernels<2, float>(), square_kernels<4, float>(), line_kernels<float>()},
};

static const ComputeKernels kComputeDouble = {
    DType::kDouble,
    DType::kDouble,
    Vector<double>::kLanes,
    kMaxVectors * Vector<double>::kLanes,
    1,
    Dot<double, double>::kBlock,
    &gemm<MultiplyDouble>,
    &depthwise<double, double>,
    {nullptr, &load_tile<double, double>, nullptr, nullptr},
    {nullptr, &store_transposed<double, double>, nullptr, nullptr},
    {nullptr, &pack_panel<double, double>, nullptr, nullptr},
    {nullptr, &dot<Dot<double, double>>, nullptr, nullptr},
    {nullptr, &add_planes<double, double>, nullptr, nullptr},
    &plane_window<double>,
    {nullptr, &spread_plane<double, double>, nullptr, nullptr},
    &finish_sums<double>,
};

// bf16 tiles and weights in pairs. `gemm` and `dot` are nullptr where the instruction set has no bf16 products.
constexpr ComputeKernels compute_bfloat16(GemmFunction gemm, DotFunction dot) {
  return {
      DType::kBFloat16,
      DType::kFloat,
      Vector<float>::kLanes,
      kMaxVectors * Vector<float>::kLanes,
      2,
      kDotBlockBytes / 2,
      gemm,
      &depthwise<float, BFloat16>,
      {nullptr, nullptr, &load_tile<BFloat16, BFloat16>, nullptr},
      {nullptr, nullptr, &store_transposed<BFloat16, float>, nullptr},
      {nullptr, nullptr, &pack_panel_pairs, nullptr},
      {nullptr, nullptr, dot, nullptr},
      {nullptr, nullptr, &add_planes<float, BFloat16>, nullptr},
      nullptr,
      {},
      &finish_sums<float>,
      {{}, square_kernels<2, BFloat16>(), {}, line_kernels<BFloat16>()},
  };
}

#if defined(__AVX512BF16__)
static const ComputeKernels kComputeBFloat16 = compute_bfloat16(&gemm<MultiplyBFloat16>, &dot<DotBFloat16>);
#else
static const ComputeKernels kComputeBFloat16 = compute_bfloat16(nullptr, nullptr);
#endif

}  // namespace LOWRANK_ISA
}  // namespace lowrank_ops

#define LOWRANK_DEFINE_KERNEL_TABLE(isa)                                                               \
  namespace lowrank_ops {                                                                              \
  const KernelTable& kernels_##isa() {                                                                 \
    static const KernelTable table = {#isa, &LOWRANK_ISA::kComputeFloat, &LOWRANK_ISA::kComputeDouble, \
                                      &LOWRANK_ISA::kComputeBFloat16};                                 \
    return table;                                                                                      \
  }                                                                                                    \
  }
