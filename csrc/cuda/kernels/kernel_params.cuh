// What a kernel is compiled for, and what it is called with.
#pragma once

#include "cuda/kernels/common_case.h"
#include "cuda/kernels/primitives.cuh"

namespace lowrank_ops {

struct KernelParams {
  BlockParams block;
  SharedLayout layout;
  // What threads divide by: the CTAs of a tile, the tiles of the two axes and their lattices; halo and tile.
  Divider splits, row_tiles, column_tiles, row_lattice, column_lattice, halo_h, halo_w, tile_h, tile_w;
  int split_passes, longer_splits;  // passes of stage 3 that each split has, and how many splits have one more
  LeanParams lean;                  // of the lean kernel only
};

// The constants of one instance. `is_lean`: for the common case (common_case.h).
template <Op operation, typename EngineType, Family family, int index, bool is_lean>
struct Instance {
  using Engine = EngineType;
  using Element = typename Engine::Element;
  using Sum = typename Engine::Sum;
  static constexpr Op op = operation;
  static constexpr bool lean = is_lean;
  static constexpr Config config = config_of(family, index, op != Op::kLinear);
  static constexpr int threads = config.threads();
  static constexpr int element = int(sizeof(Element));
  static constexpr int input_stride = kInputChunkBytes + kVectorBytes;  // of a row of a chunk of stage 1
  static constexpr bool has_core = op == Op::kTucker;
};

// The passes over output channels that fall to a CTA.
struct Passes {
  int first, last;
};

}  // namespace lowrank_ops
