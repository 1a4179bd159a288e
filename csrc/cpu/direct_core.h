// Tucker's core stage without Winograd's transforms: a GEMM that slides over the ring buffer of hidden rows (conv.h),
// or for cores with one output channel what CoreStage says (plan/cpu/planner.h).
#pragma once

#include "cpu/conv_block.h"
#include "cpu/hidden_rows.h"
#include "cpu/team.h"

namespace lowrank_ops {

class DirectCore {
 public:
  DirectCore(const ConvBlock& block, CoreStage way) : block_(block), way_(way) {}
  // The middle stage of run_conv.
  void run(Team& team, const HiddenRows& hidden, int64_t row, int64_t rows, int64_t columns, void* tile,
           void* extra) const;

 private:
  // CoreStage::kPlanes.
  void slide_windows(Team& team, const HiddenRows& hidden, int64_t row, int64_t rows, int64_t columns,
                     char* tile) const;

  const ConvBlock& block_;
  const CoreStage way_;
};

}  // namespace lowrank_ops
