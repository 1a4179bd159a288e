// Tucker's core stage by Winograd's F(m x m, 3x3), m = 2 or 4 (kernels/winograd.h): 16 products for 4 outputs instead
// of 36, or 36 for 16 outputs instead of 144. Where which is used says the planner (CpuTile::winograd).
//
//   hidden rows --input transform--> [places, patches, R1] --a GEMM a place--> [places, patches, R2] --output
//   transform--> tile                                                                                          (m +
//   2)^2 places
//
// A patch is [m + 2, m + 2] hidden values and gives [m, m] outputs. Patches start at multiples of m of the image's rows
// and columns, whatever the strips and tiles are, which begin there too, so that the bits of a result do not depend on
// the threads. The hidden rows are kept as fp32 sums: in bf16 they are rounded once, after the transform, instead of
// before it.
#pragma once

#include "cpu/conv.h"

namespace lowrank_ops {

// The transformed core, packed: [R2, places, R1]. `core()` is [R2, 3, 3, R1] in memory.
PackedWeight pack_winograd(const WinogradKernels& kernels, c10::function_ref<at::Tensor()> core, int64_t r1, int64_t r2,
                           DType dtype, const Engine& engine, const char* prepared = nullptr);

class WinogradCore {
 public:
  WinogradCore(const PackedWeight& weight, const Problem& problem, const CpuTile& tile, const Engine& engine);
  int64_t scratch_bytes(int64_t threads) const;
  // The middle stage of run_conv.
  void run(const ConvBlock& block, Team& team, const HiddenRows& hidden, int64_t row, int64_t rows, int64_t columns,
           void* tile, void* scratch) const;

 private:
  int64_t sums_bytes() const;  // of a thread

  const Engine& engine_;
  const WinogradKernels& kernels_;
  const PackedWeight& weight_;
  int64_t channels_, most_patches_;
};

}  // namespace lowrank_ops
