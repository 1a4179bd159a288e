// Tucker's core stage by Winograd's F(2x2, 3x3): 16 products for 4 outputs instead of 36 (kernels/winograd.h). Where it
// is used says the planner (CpuTile::winograd).
//
//   hidden rows --input transform--> [16, patches, R1] --16 GEMMs--> [16, patches, R2] --output transform--> tile
//
// A patch is 4x4 hidden values and gives 2x2 outputs. Patches start at even rows and columns of the image, whatever the
// strips and tiles are: they begin at even places, so that the bits of a result do not depend on the threads. The
// hidden rows are kept as fp32 sums: in bf16 they are rounded once, after the transform, instead of before it.
#pragma once

#include "cpu/conv.h"

namespace lowrank_ops {

// The transformed core, packed: [R2, 16 places, R1]. `core()` is [R2, 3, 3, R1] in memory.
PackedWeight pack_winograd(c10::function_ref<at::Tensor()> core, int64_t r1, int64_t r2, DType dtype,
                           const Engine& engine, const char* prepared = nullptr);

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
  const PackedWeight& weight_;
  int64_t channels_, most_patches_;
};

}  // namespace lowrank_ops
