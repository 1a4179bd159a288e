// The first stage of a convolution and the ring buffer that holds its hidden rows (conv.h).
#pragma once

#include "cpu/conv_block.h"
#include "cpu/prefetcher.h"
#include "cpu/team.h"

namespace lowrank_ops {

// The hidden rows of one task. Rows are numbered as on the lattice (plan/axis.h): row z of the lattice
// lies in row z % ring_rows of the ring buffer.
class HiddenRows {
 public:
  // `prefetched_until`: the first lattice row that the task before did not prefetch.
  HiddenRows(const ConvBlock& block, Team& team, const ConvTask& task, void* ring, void* input_copy,
             int64_t prefetched_until);
  // Computes those of the rows [begin, end) that are not there yet; begin never decreases.
  void produce(int64_t begin, int64_t end);
  const char* row(int64_t z) const { return ring_ + (z % ring_rows_) * row_bytes_; }
  // Whether `rows` rows from z are one run of pixels in the ring buffer, without the image's edges between them.
  bool is_one_run(int64_t z, int64_t rows) const { return ring_rows_touch() && z % ring_rows_ + rows <= ring_rows_; }
  const TaskColumns& columns() const { return columns_; }
  int64_t pixel_bytes() const { return pixel_bytes_; }
  // Gives pages to the memory of `rows` output rows from `row`, and of the row after them, where the next step's
  // prefetches begin. Called before a step whose output is prefetched before it is written.
  void map_output(int64_t row, int64_t rows) const;
  // Begins the prefetches of a step of `rows` output rows from `row`; `next` (or nullptr) is the task after this one.
  // Returns the first lattice row of `next` that is not prefetched.
  int64_t begin_prefetches(int64_t row, int64_t rows, const ConvTask* next);
  Prefetcher& prefetcher() const { return prefetcher_; }

  static int64_t ring_bytes(const ConvBlock& block);
  static int64_t input_copy_bytes(const ConvBlock& block);

 private:
  // `rows` rows of the task's part of the output from `row`; nothing where its channels are not next to each other.
  MemoryRows output_rows(int64_t row, int64_t rows) const;
  // The input of a task's lattice rows [begin, end), without those outside the image; nothing where the kernel reads no
  // whole rows of it. Moves `begin` to the first row that is not among them.
  MemoryRows input_rows(const ConvTask& task, int64_t& begin, int64_t end) const;
  // Multiply-adds of a step of `pixels` output pixels that are done by calls with prefetches.
  double prefetching_multiply_adds(int64_t pixels) const;
  bool ring_rows_touch() const { return row_bytes_ == (columns_.inside_end - columns_.inside_begin) * pixel_bytes_; }
  // Copies the input of `rows` lattice rows from z to where the kernel can read it.
  void copy_input(int64_t z, int64_t rows);
  // The first stage for `rows` rows from z, whose pixels begin at `source`, `source_bytes` from row to row.
  void compute(int64_t z, int64_t rows, const char* source, int64_t source_bytes);
  void add_channels(int64_t z, int64_t rows, const char* source, int64_t source_bytes);
  // Sums of the channels of `count` pixels -> the ring buffer, from pixel `first` of row z on.
  void write_sums(int64_t z, int64_t first, int64_t count, int64_t columns, const char* sums);

  const ConvBlock& block_;
  Team& team_;
  const ConvTask task_;
  const TaskColumns columns_;
  int64_t ring_rows_, pixel_bytes_, row_bytes_;
  int64_t next_ = 0;  // the first row that is not computed yet
  const char* image_;
  int64_t input_row_bytes_, input_pixel_stride_, input_channel_stride_;
  bool direct_;  // the kernel reads the input where it lies; otherwise it is copied first
  bool joined_;  // rows lie one behind the other: copied as one long row, so that short ones fill whole vectors
  int64_t rows_together_;  // that go through the stage in one call
  char* ring_;
  char* input_copy_;
  mutable Prefetcher prefetcher_;
  // The first lattice rows that were not prefetched before this step, and that are not prefetched during it either.
  int64_t prefetched_until_, prefetching_until_;
};

}  // namespace lowrank_ops
