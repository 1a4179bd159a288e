// A kernel's parameters, and the constants that it is compiled for.
#pragma once

#include "cuda/kernels/common_case.h"
#include "cuda/kernels/primitives.cuh"

namespace lowrank_ops {

struct KernelParams {
  BlockParams block;
  SharedLayout layout;
  // The numbers that threads divide by: CTAs per tile, tiles per axis, lattices, sides of the halo and of the tile.
  Divider splits, row_tiles, column_tiles, row_lattice, column_lattice, halo_h, halo_w, tile_h, tile_w;
  int split_passes, longer_splits;  // passes of stage 3 per split; how many splits have one more
  int tiles;                        // of the whole output
  LeanParams lean;                  // set for the lean kernel only
};

// The constants of one instance of the kernel. `is_lean`: the lean one, for the common case (common_case.h).
template <Op operation, typename EngineType, Family family, int index, bool is_lean>
struct Instance {
  using Engine = EngineType;
  using Element = typename Engine::Element;
  using Sum = typename Engine::Sum;
  static constexpr Op op = operation;
  static constexpr bool lean = is_lean;
  static constexpr Config config = config_of(family, index, op != Op::kLinear);
  static constexpr bool persistent = config.persistent;
  static constexpr int threads = config.threads();
  static constexpr int element = int(sizeof(Element));
  static constexpr int input_stride = kInputChunkBytes + kVectorBytes;  // from row to row in a chunk of stage 1
  static constexpr bool has_core = op == Op::kTucker;
};

// The passes over output channels that a CTA computes: [first, last).
struct Passes {
  int first, last;
};

}  // namespace lowrank_ops
