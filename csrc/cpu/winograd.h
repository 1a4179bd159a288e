// Tucker's core stage by Winograd's transforms (kernels/winograd.h): F(m x m, 3x3) for 3x3 cores, 16 products for 4
// outputs instead of 36 (m = 2) or 36 for 16 outputs instead of 144 (m = 4), and F(3, 3) along a line of 1xKW taps, 5
// for every 3 outputs and 3 taps instead of 9. The planner decides where each is used (CpuTile::winograd).
//
//   hidden rows --input transform--> [places, patches, R1] --one GEMM per place--> [places, patches, R2] --output
//   transform--> tile
//
// Patches overlap by two rows and columns of hidden values, lines by two columns. They start at multiples of their
// outputs in the image; strips and tiles begin there too, so that the bits of a result do not depend on the number of
// threads. A line's patch is also what an earlier patch needs for its next three taps: it is transformed once, and the
// GEMM of a place runs over ceil(KW / 3) neighbours as one depth. The hidden rows are kept as fp32 sums: in bf16 they
// are rounded once, after the transform, instead of before it.
#pragma once

#include "cpu/conv_block.h"
#include "cpu/hidden_rows.h"
#include "cpu/team.h"

namespace lowrank_ops {

// The transformed core, packed: [R2, places, groups of taps, R1]. `core()` is [R2, KH, KW, R1] in memory; only the
// ranks, the kernel and the dtype of `problem` are read.
PackedWeight pack_winograd(Winograd winograd, c10::function_ref<at::Tensor()> core, const Problem& problem,
                           const KernelSet& kernel_set, const char* prepared = nullptr);

class WinogradCore {
 public:
  explicit WinogradCore(const ConvBlock& block);
  int64_t scratch_bytes(int64_t threads) const;
  // The middle stage of run_conv.
  void run(Team& team, const HiddenRows& hidden, int64_t row, int64_t rows, int64_t columns, void* tile,
           void* scratch) const;

 private:
  struct Step;
  class Products;
  // This thread's share of the input transform.
  void transform_inputs(const Step& step, const Share& share) const;
  int64_t inputs_bytes() const;  // of all threads
  int64_t sums_bytes() const;    // per thread

  const ConvBlock& block_;
  const PackedWeight& weight_;
  const WinogradKernels& kernels_;
  const Patch patch_;
  int64_t groups_, channels_, most_patches_, most_inputs_;
  int64_t element_bytes_, sum_bytes_;
};

}  // namespace lowrank_ops
