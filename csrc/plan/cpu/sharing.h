// The sizes of a convolution's tiles, and how the threads of a CPU divide the tiles.
#pragma once

#include "plan/cpu/planner.h"

namespace lowrank_ops {

constexpr int64_t kAlign = 16;  // columns of a tile: the lanes of the widest vector

struct TileSizes {
  bool converted;        // elements are fp32, whatever the tensors are
  int64_t element, sum;  // bytes
  int64_t r1, r2;        // ranks, rounded up to whole vectors
  TileSizes(const Problem& problem, const CpuCaps& caps);
};

// The bytes of scratch memory for a tile of some output rows and columns.
class ConvScratch {
 public:
  ConvScratch(const Problem& problem, const CpuCaps& caps, Winograd winograd);
  int64_t operator()(int64_t tile_rows, int64_t tile_columns) const;

 private:
  const TileSizes sizes_;
  const Axis rows_, columns_;
  const Patch patch_;
  int64_t tap_groups_, hidden_pixel_bytes_, tile_pixel_bytes_;
  int64_t copied_channels_;  // of an input pixel; 0: the kernel reads the input where it lies
  int64_t copied_columns_;   // of the output, before it is transposed; 0: the kernel writes the output directly
};

// Divides the tile of one thread among caps.threads: strips, teams, and how many tasks a thread takes. Results do not
// depend on the division: each output is one sum in one thread.
void share_out(const Problem& problem, const CpuCaps& caps, const ConvScratch& scratch, CpuTile& tile);

}  // namespace lowrank_ops
