// One call of a convolution on a CPU: the block, its weights, and how its output is divided.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>

#include "cpu/channel_sum.h"
#include "cpu/isa.h"
#include "cpu/prepared.h"
#include "cpu/weights.h"
#include "ops/call.h"
#include "plan/cpu/planner.h"

namespace lowrank_ops {

// The output's memory, in the input's memory format.
at::Tensor empty_output(const at::Tensor& input, const Problem& problem);

struct ConvBlock {
  ConvBlock(const OpCall& call, const Problem& problem, const CpuTile& tile, const KernelSet& kernel_set,
            const Prepared& prepared, at::Tensor& output);

  const KernelSet& kernel_set;
  const Problem& problem;
  const CpuTile& tile;
  const at::Tensor& input;
  at::Tensor& output;
  PackedWeight in_weight;
  PackedWeight* core_weight = nullptr;  // Tucker; nullptr: CP
  const char* core_row = nullptr;       // elements [taps, R1], where the core is read unpacked (CoreStage)
  PackedWeight out_weight;
  const SumRows bias;
  const std::optional<ChannelSum> channel_sum;  // runs the first stage for a rank of one; otherwise in_weight does
  const std::optional<SumRows> out_row;         // out_factor, where the last stage spreads a plane (spreads_plane)
  DType hidden_type;                            // of the ring buffer
  const Axis rows = row_axis(problem), columns = column_axis(problem);

  // How many values a pixel of the ring buffer and of the tile is padded to a multiple of. The direct core reads the
  // ranks of a pixel as one run, padded to whole groups, and so does CP with a plane for its one rank; other depthwise
  // stages and Winograd's transforms read and write whole vectors.
  bool has_dense_ranks() const {
    return core_weight ? tile.winograd == Winograd::kNone : problem.r1 == 1 && kernel_set.kernels->group == 1;
  }
  int64_t rank_unit() const { return has_dense_ranks() ? kernel_set.kernels->group : kernel_set.kernels->lanes; }
  int64_t hidden_columns() const { return round_up(problem.r1, rank_unit()); }
  int64_t tile_columns() const { return round_up(problem.r2, rank_unit()); }
  // The weights to pack, in the order of packing: the first stage's comes last, and is still in L2 when it is read.
  std::array<PackedWeight*, 3> weights() {
    return {out_row ? nullptr : &out_weight, core_row ? nullptr : core_weight, channel_sum ? nullptr : &in_weight};
  }
};

// Output rows [first_row, last_row) and columns [first_column, last_column) of an image.
struct ConvTask {
  int64_t image, first_row, last_row, first_column, last_column;
  int64_t columns() const { return last_column - first_column; }
};

// The columns of the lattice that a task reads: inside the image are [inside_begin, inside_end) of `span`.
struct TaskColumns {
  int64_t span, inside_begin, inside_end;
  TaskColumns(const Axis& columns, const ConvTask& task);
};

}  // namespace lowrank_ops
