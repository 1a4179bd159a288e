// The loop that both convolutions share: how a tile travels through the stages of a block on a CPU.
//
// A task is a strip of output rows, `columns` wide, of one image. It walks down the strip in steps of a few output
// rows. Threads take tasks, or, where there are too few of them, share every stage of each (team.h).
//
//   input rows --(1) in_factor--> ring buffer of hidden rows --(2) core or depthwise--> tile --(3) out_factor--> output
//
// The ring buffer holds the hidden rows that the taps of one step can see, zero-padded at the image's edges: each
// hidden row is computed once per strip. Ring and tile fit L2; no intermediate is ever a whole tensor. Where images are
// large, a step prefetches the output rows that it will write and the input rows that the next step will read
// (prefetcher.h). Rows and columns are those of the lattice that some tap reads (plan/axis.h): a 1x1 core
// with stride 2 reads every other row only.
//
// conv_block.h holds what a call consists of, hidden_rows.h stage (1), direct_core.h, winograd.h and cp.cpp stage (2),
// and conv.cpp stage (3).
#pragma once

#include <ATen/Parallel.h>

#include "cpu/brgemm.h"
#include "cpu/conv_block.h"
#include "cpu/hidden_rows.h"
#include "cpu/pages.h"
#include "cpu/team.h"
#include "cpu/weights.h"

namespace lowrank_ops {

// The tasks of a call: images x strips x tiles of columns.
class ConvTasks {
 public:
  explicit ConvTasks(const ConvBlock& block);
  int64_t count() const { return problem_.n * strips_ * column_tiles_; }
  ConvTask operator[](int64_t index) const;

 private:
  const Problem& problem_;
  int64_t columns_, column_tiles_;  // of a tile; in a row
  int64_t strip_, strips_;          // rows of a strip; strips of an image
};

// Scratch memory for one task at a time.
struct ConvBuffers {
  Scratch scratch;
  void* ring;
  void* tile;
  void* copies;  // of input rows that the kernel cannot read where they lie, then of output that is to be transposed
  void* extra;   // for the middle stage
  ConvBuffers(const ConvBlock& block, int64_t extra_bytes);
};

// Stage (3) for `rows` output rows of a task from `row`: tile [rows * columns, tile_columns] -> output. Output that is
// to be transposed waits in `copies`, output_copy_bytes() per thread.
void write_output(const ConvBlock& block, Team& team, Prefetcher& prefetcher, const ConvTask& task, int64_t row,
                  int64_t rows, const void* tile, void* copies);
int64_t output_copy_bytes(const ConvBlock& block);

// All stages of the tasks [begin, end).
template <typename Middle>
void run_tasks(const ConvBlock& block, const ConvTasks& tasks, int64_t begin, int64_t end, Team& team, bool far_weights,
               int64_t extra_bytes, const Middle& middle) {
  const CpuTile& tile = block.tile;
  const ConvBuffers buffers(block, extra_bytes);
  const BrgemmScope products;
  int64_t prefetched_until = 0;
  for (int64_t index = begin; index < end; ++index) {
    const ConvTask task = tasks[index], next = tasks[index + 1];
    HiddenRows hidden(block, team, task, buffers.ring, buffers.copies, prefetched_until);
    for (int64_t row = task.first_row; row < task.last_row; row += tile.rows) {
      const int64_t rows = std::min(tile.rows, task.last_row - row);
      const int64_t top = row * block.rows.stride;
      hidden.prefetcher().weights_are_far = far_weights && index == begin && row == task.first_row;
      if (tile.far) hidden.map_output(row, rows);
      if (tile.spreads_prefetches)
        prefetched_until = hidden.begin_prefetches(row, rows, index + 1 < end ? &next : nullptr);
      hidden.produce(top, top + block.rows.span(rows));
      middle(team, hidden, row, rows, task.columns(), buffers.tile, buffers.extra);
      write_output(block, team, hidden.prefetcher(), task, row, rows, buffers.tile, buffers.copies);
    }
  }
}

// Runs `middle(team, hidden, row, rows, columns, tile, extra)`, which fills the tile for `rows` output rows from `row`,
// between the outer stages, for all tasks in parallel. `extra` is scratch memory of `extra_bytes_of(threads)` bytes.
template <typename ExtraBytes, typename Middle>
void run_conv(ConvBlock& block, const ExtraBytes& extra_bytes_of, const Middle& middle) {
  const CpuTile& tile = block.tile;
  const ConvTasks tasks(block);
  const int64_t extra_bytes = extra_bytes_of(tile.team);
  // Weights that this call packs are in L2; those packed before come from wherever the layers between have left them. A
  // team's threads read panels of their own.
  const bool far_weights = tile.team == 1 && !needs_packing(block.weights());
  if (tile.team > 1) {
    Team team(tile.team);
    team.call([&] {
      // Each thread packs the panels that it will read, so that they are in its cache then.
      if (needs_packing(block.weights())) team.run([&](const Share& share) { pack(block.weights(), share); });
      run_tasks(block, tasks, 0, tasks.count(), team, far_weights, extra_bytes, middle);
    });
    return;
  }
  const bool each_packs = pack_for_tasks(block.weights(), ceil_div(tasks.count(), tile.tasks_each));
  at::parallel_for(0, tasks.count(), tile.tasks_each, [&](int64_t begin, int64_t end) {
    if (each_packs) pack_own(block.weights());
    Team alone(1);
    run_tasks(block, tasks, begin, end, alone, far_weights, extra_bytes, middle);
  });
}

}  // namespace lowrank_ops
