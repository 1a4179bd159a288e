// The loop that both convolutions share: how a tile travels through the stages of a block on a CPU.
//
// A task is a strip of output rows, `columns` wide, of one image. It walks down the strip in steps of a few output
// rows. Threads take tasks, or, where there are too few of them, share every stage of each (team.h).
//
//   input rows --(1) in_factor--> ring buffer of hidden rows --(2) core or depthwise--> tile --(3) out_factor--> output
//
// The ring buffer holds the hidden rows that the taps of one step can see, zero-padded at the image's edges: each
// hidden row is computed once a strip. Ring and tile fit L2; no intermediate is ever a whole tensor. Of large images,
// what a step will write and what the next will read is asked for while it computes (Ahead). Rows and columns are those
// of the lattice that some tap reads (plan.h, Axis): a 1x1 core with stride 2 reads every other row only.
#pragma once

#include <ATen/Parallel.h>

#include <array>
#include <cstring>

#include "cpu/brgemm.h"
#include "cpu/channel_sum.h"
#include "cpu/pages.h"
#include "cpu/team.h"
#include "cpu/weights.h"
#include "plan/cpu/planner.h"

namespace lowrank_ops {

struct ConvBlock {
  Engine engine;
  const Problem& problem;
  const CpuTile& tile;
  const at::Tensor& input;
  at::Tensor& output;
  PackedWeight& in_weight;
  PackedWeight* core_weight;  // nullptr: CP
  const char* core_row;       // elements [taps, R1], where the core reads them unpacked (CoreStage); otherwise nullptr
  PackedWeight& out_weight;
  const SumRows& bias;
  const std::optional<ChannelSum>& channel_sum;  // the first stage for a rank of one; otherwise by in_weight
  const std::optional<SumRows>& out_row;         // out_factor, where a plane is spread to those of the output
  DType hidden_type;                             // of the ring buffer
  Axis rows = row_axis(problem), columns = column_axis(problem);

  // The direct core reads ranks one behind the other, in whole groups, and so does CP with a plane for its one rank;
  // other depthwise stages and transforms read and write whole vectors.
  bool has_dense_ranks() const {
    return core_weight ? tile.winograd == Winograd::kNone : problem.r1 == 1 && engine.kernels->group == 1;
  }
  int64_t rank_unit() const { return has_dense_ranks() ? engine.kernels->group : engine.kernels->lanes; }
  int64_t hidden_columns() const { return round_up(problem.r1, rank_unit()); }
  int64_t tile_columns() const { return round_up(problem.r2, rank_unit()); }
  // In the order of packing: what is read first comes last, and is still in L2.
  std::array<PackedWeight*, 3> weights() const {
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

// What a step's last stage and the next step's first will touch, asked for evenly while the step computes: memory works
// all the time then, and not only beside the two outer stages.
class Ahead {
 public:
  // Begins a step of `multiply_adds`: output rows first, then input rows.
  void begin(const MemoryRows& output, const MemoryRows& input, double multiply_adds);
  // Gives a call its share.
  void attach(GemmCall& call);
  // The same for the weights that come next, where those are on their first way to L2 (`weights_are_far`): to a call
  // that is part `part` of the `parts` that use a panel.
  void attach_weight(GemmCall& call, const void* next, int64_t bytes, int64_t part, int64_t parts) const;
  // What comes after a panel: the next one, or the first of `then` (nullptr: nothing).
  void attach_next_panel(GemmCall& call, const PackedWeight& weight, const PackedWeight* then, int64_t panel,
                         int64_t part, int64_t parts) const;
  bool weights_are_far = false;

 private:
  std::array<MemoryRows, 2> regions_;
  int64_t region_ = 2, row_ = 0, byte_ = 0;
  double rate_ = 0, due_ = 0;  // bytes a multiply-add, bytes
};

// The hidden rows of one task: stage (1) and the ring buffer.
class HiddenRows {
 public:
  // `asked`: lattice rows below were asked for by the task before.
  HiddenRows(const ConvBlock& block, Team& team, const ConvTask& task, void* ring, void* staging, int64_t asked);
  // Computes what is missing of the rows [begin, end) of the lattice; begin never decreases.
  void produce(int64_t begin, int64_t end);
  const char* row(int64_t z) const { return ring_ + (z % ring_rows_) * row_bytes_; }
  // Whether these rows of the lattice are one run of pixels, without the image's edges between them.
  bool is_one_run(int64_t z, int64_t rows) const { return ring_rows_touch() && z % ring_rows_ + rows <= ring_rows_; }
  const TaskColumns& columns() const { return columns_; }
  int64_t pixel_bytes() const { return pixel_bytes_; }
  // Before a step of `rows` output rows from `row`, where output is asked for before it is written: gives it pages, and
  // the row after them, where asking for it begins.
  void map_output(int64_t row, int64_t rows) const;
  // Before a step of `rows` output rows from `row`. After the task's last step comes `next`, nullptr: nothing. Returns
  // how far the rows of `next` were asked for.
  int64_t look_ahead(int64_t row, int64_t rows, const ConvTask* next);
  Ahead& ahead() const { return ahead_; }

  static int64_t ring_bytes(const ConvBlock& block);
  static int64_t staging_bytes(const ConvBlock& block);

 private:
  // `rows` rows of the task's part of the output from `row`; nothing where its channels are not next to each other.
  MemoryRows output_rows(int64_t row, int64_t rows) const;
  bool ring_rows_touch() const { return row_bytes_ == (columns_.inside_end - columns_.inside_begin) * pixel_bytes_; }
  // The input rows of `rows` lattice rows from z, copied to where the kernel can read them.
  void stage(int64_t z, int64_t rows);
  // The first stage for `rows` rows from z, from their pixels at `source`, `source_bytes` a row.
  void compute(int64_t z, int64_t rows, const char* source, int64_t source_bytes);
  void add_channels(int64_t z, int64_t rows, const char* source, int64_t source_bytes);

  const ConvBlock& block_;
  Team& team_;
  const ConvTask task_;
  const TaskColumns columns_;
  int64_t ring_rows_, pixel_bytes_, row_bytes_;
  int64_t next_ = 0;
  const char* image_;
  int64_t input_row_bytes_, input_pixel_stride_, input_channel_stride_;
  bool direct_;    // the kernel reads the input where it lies; otherwise its rows are staged
  bool joined_;    // rows lie one behind the other: staged as one long row, so that short ones fill whole vectors
  int64_t group_;  // rows that go through the stage together
  char* ring_;
  char* staging_;
  mutable Ahead ahead_;
  int64_t asked_, asking_;  // lattice rows below were asked for before this step, are asked for in it
};

// Stage (3) for `rows` output rows of a task from `row`: tile [rows * columns, tile_columns] -> output. Each thread
// stages in its own `staging`, output_staging_bytes() apart.
void write_output(const ConvBlock& block, Team& team, Ahead& ahead, const ConvTask& task, int64_t row, int64_t rows,
                  const void* tile, void* staging);
int64_t output_staging_bytes(const ConvBlock& block);  // of a thread

at::Tensor empty_output(const at::Tensor& input, const Problem& problem);
// Nothing where the last stage is a product with panels (spreads_plane).
std::optional<SumRows> out_row_of(const at::Tensor& out_factor, const Problem& problem, Winograd winograd,
                                  const Engine& engine);

// Runs `middle(team, hidden, row, rows, columns, tile, scratch)`, which fills the tile for `rows` output rows from
// `row`, between the outer stages, for all tasks in parallel. `extra_bytes(team)` of scratch are for it.
template <typename ExtraBytes, typename Middle>
void run_conv(const ConvBlock& block, const ExtraBytes& extra_bytes_of, const Middle& middle) {
  const Problem& p = block.problem;
  const CpuTile& t = block.tile;
  const int64_t column_tiles = (p.ow + t.columns - 1) / t.columns;
  // Winograd's patches are the same ones for any number of strips.
  const int64_t strip = round_up((p.oh + t.strips - 1) / t.strips, patch_of(t.winograd).rows);
  const int64_t strips = (p.oh + strip - 1) / strip;
  const int64_t tile_bytes = t.rows * t.columns * block.tile_columns() * element_bytes(block.engine.kernels->element);
  const int64_t extra_bytes = extra_bytes_of(t.team);
  const int64_t staging_bytes = std::max(HiddenRows::staging_bytes(block), t.team * output_staging_bytes(block));
  const int64_t scratch_bytes = Scratch::padded(HiddenRows::ring_bytes(block)) + Scratch::padded(tile_bytes) +
                                Scratch::padded(staging_bytes) + Scratch::padded(extra_bytes);
  const int64_t tasks = p.n * strips * column_tiles;
  // Packed in this call, they are near; packed before, they come from wherever the layers between have left them. A
  // team's threads read panels of their own.
  const bool far_weights = t.team == 1 && !needs_packing(block.weights());
  const auto run_tasks = [&](Team& team, int64_t begin, int64_t end) {
    Scratch scratch(scratch_bytes);
    const BrgemmScope products;
    void* ring = scratch.take(HiddenRows::ring_bytes(block));
    void* tile = scratch.take(tile_bytes);
    void* staging = scratch.take(staging_bytes);
    void* extra = scratch.take(extra_bytes);
    if (p.r2 % block.engine.kernels->group != 0) std::memset(tile, 0, size_t(tile_bytes));  // the odd rank's partner
    const auto locate = [&](int64_t index) {
      const int64_t column = index % column_tiles * t.columns, row = index / column_tiles % strips * strip;
      return ConvTask{index / column_tiles / strips, row, std::min(row + strip, p.oh), column,
                      std::min(column + t.columns, p.ow)};
    };
    int64_t asked = 0;
    for (int64_t index = begin; index < end; ++index) {
      const ConvTask task = locate(index), next = locate(index + 1);
      HiddenRows hidden(block, team, task, ring, staging, asked);
      for (int64_t row = task.first_row; row < task.last_row; row += t.rows) {
        const int64_t rows = std::min(t.rows, task.last_row - row);
        const int64_t top = row * block.rows.stride;
        hidden.ahead().weights_are_far = far_weights && index == begin && row == task.first_row;
        if (t.far) hidden.map_output(row, rows);
        if (t.ahead) asked = hidden.look_ahead(row, rows, index + 1 < end ? &next : nullptr);
        hidden.produce(top, top + block.rows.span(rows));
        middle(team, hidden, row, rows, task.columns(), tile, extra);
        write_output(block, team, hidden.ahead(), task, row, rows, tile, staging);
      }
    }
  };
  if (t.team > 1) {
    Team team(t.team);
    team.call([&] {
      // Each packs the panels that it will read: it has them in its cache then.
      if (needs_packing(block.weights())) team.run([&](const Share& share) { pack(block.weights(), share); });
      run_tasks(team, 0, tasks);
    });
  } else {
    const bool each_packs = pack_for_tasks(block.weights(), ceil_div(tasks, t.tasks_each));
    at::parallel_for(0, tasks, t.tasks_each, [&](int64_t begin, int64_t end) {
      if (each_packs) pack_own(block.weights());
      Team alone(1);
      run_tasks(alone, begin, end);
    });
  }
}

}  // namespace lowrank_ops
