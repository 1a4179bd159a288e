// Prefetches that are spread over the GEMM calls of a step, so that memory works all the time and not only beside the
// two outer stages.
#pragma once

#include <array>
#include <cstdint>

#include "cpu/kernels/kernels.h"
#include "cpu/pages.h"
#include "cpu/weights.h"

namespace lowrank_ops {

// Spreads this step's output rows and the next step's input rows over this step's GEMM calls.
class Prefetcher {
 public:
  // Begins a step of `multiply_adds`: `output` is prefetched first, then `input`.
  void begin(const MemoryRows& output, const MemoryRows& input, double multiply_adds);
  // Gives a call the prefetches that are due by its share of the step's multiply-adds.
  void attach(GemmCall& call);
  // Prefetches a weight for later calls; does nothing unless `weights_are_far`. `parts` calls share these `bytes` from
  // `next`, and this call is number `part` of them.
  void attach_weight(GemmCall& call, const void* next, int64_t bytes, int64_t part, int64_t parts) const;
  // The same for the panel that is read after `panel` of `weight`: the next one, or the first of `next_weight`
  // (nullptr: none).
  void attach_next_panel(GemmCall& call, const PackedWeight& weight, const PackedWeight* next_weight, int64_t panel,
                         int64_t part, int64_t parts) const;
  bool weights_are_far = false;  // this step is the first to read the weights: they are not in L2 yet

 private:
  std::array<MemoryRows, 2> regions_;
  int64_t region_ = 2, row_ = 0, byte_ = 0;  // the position of the next prefetch; region 2: all are done
  double rate_ = 0, due_ = 0;                // bytes per multiply-add; bytes that are due
};

}  // namespace lowrank_ops
