// What a convolution's tiles hold, and how the threads of a CPU divide the tiles.
#pragma once

#include "plan/cpu/planner.h"

namespace lowrank_ops {

constexpr int64_t kAlign = 16;  // columns of a tile: the lanes of the widest vector

struct TileSizes {
  bool converted;        // elements are fp32, whatever the tensors are
  int64_t element, sum;  // bytes
  int64_t r1, r2;        // of whole vectors
  TileSizes(const Problem& problem, const CpuCaps& caps);
};

// Bytes of scratch for a tile of so many output rows and columns.
class ConvScratch {
 public:
  ConvScratch(const Problem& problem, const CpuCaps& caps, Winograd winograd);
  int64_t operator()(int64_t tile_rows, int64_t tile_columns) const;

 private:
  const TileSizes sizes_;
  const Axis rows_, columns_;
  const Patch patch_;
  int64_t tap_groups_, hidden_pixel_bytes_, tile_pixel_bytes_;
  int64_t staged_channels_;  // 0: the kernel reads the input where it lies
  int64_t stored_columns_;   // 0: it writes the output where it lies
};

// Divides a tile that one thread would take among caps.threads: strips, teams, how many tasks a thread takes. Results
// do not depend on it: each output is one sum in one thread.
void share_out(const Problem& problem, const CpuCaps& caps, const ConvScratch& scratch, CpuTile& tile);

}  // namespace lowrank_ops
