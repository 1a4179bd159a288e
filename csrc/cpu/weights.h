// Weights packed for the register kernels.
//
// Every call packs: nothing is cached, so nothing can be stale (no version counter sees `.data` edits or FSDP2's new
// values). Packing is a transposition in registers at about the speed of reading the weights. prepared.h
// packs once, at the user's request.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/FunctionRef.h>

#include <algorithm>

#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/team.h"

namespace lowrank_ops {

// The columns of a packed weight, divided into panels of at most panel_width columns, as even as possible.
struct Panels {
  int64_t columns, lanes, count, base, extra;  // `base` vectors per panel, one more in the first `extra`

  Panels(int64_t columns, const ComputeKernels& kernels);
  int64_t first(int64_t panel) const { return (panel * base + std::min(panel, extra)) * lanes; }
  int64_t padded_width(int64_t panel) const { return (base + (panel < extra)) * lanes; }
  int64_t width(int64_t panel) const { return std::min(padded_width(panel), columns - first(panel)); }
  int64_t padded_columns() const { return round_up(columns, lanes); }
};

// How many taps a row of a weight has in memory and in its panel, and the kernel that packs it.
struct PackedTaps {
  int64_t stored, packed;
  PackFunction pack;
};

// A factor and its panels, made by pack(). `weight()` returns it as [columns, stored taps, depth], contiguous; it is
// not called where the panels were packed before.
class PackedWeight {
 public:
  PackedWeight(c10::function_ref<at::Tensor()> weight, int64_t columns, PackedTaps taps, int64_t depth, DType dtype,
               const KernelSet& kernel_set, const char* prepared);
  const Panels& panels() const { return panels_; }
  int64_t padded_depth() const { return padded_depth_; }  // per tap
  const void* panel(int64_t index) const { return data_ + own() + panels_.first(index) * column_bytes_; }
  int64_t panel_bytes(int64_t index) const { return panels_.padded_width(index) * column_bytes_; }
  const char* data() const { return data_; }
  int64_t bytes() const { return panels_.padded_columns() * column_bytes_; }
  // How many vectors of columns there are to pack, by any thread in any order; 0 where they were packed before.
  int64_t unpacked() const { return memory_ ? panels_.padded_columns() / panels_.lanes : 0; }
  void pack(int64_t first, int64_t last) const;
  // Gives each thread panels of its own, which it has to pack itself.
  void copy_for_each(int64_t threads);

 private:
  int64_t own() const { return copies_ > 1 ? at::get_thread_num() * Scratch::padded(bytes()) : 0; }
  Panels panels_;
  PackedTaps taps_;
  int64_t depth_, padded_depth_;
  int64_t column_bytes_, row_bytes_, lane_bytes_;  // of a packed column, of its row in memory, of one step of its depth
  at::Tensor values_;
  int64_t copies_ = 1;
  AlignedMemory memory_;  // empty where the panels were packed before: `data_` points to them
  const char* data_;
};

using Weights = c10::ArrayRef<PackedWeight*>;  // a nullptr is left out
bool needs_packing(Weights weights);
// Packs all that is not packed yet, in parallel.
void pack(Weights weights);
// The same before threads divide `tasks` tasks. Returns true if each thread that runs some has to call pack_own()
// first. A core packs all weights in less time than it takes to read the half that another core has just packed (4 to
// 40 GB/s between two cores of an EPYC, packing 40 to 60), so that each thread packs for itself wherever memory allows.
bool pack_for_tasks(Weights weights, int64_t tasks);
void pack_own(Weights weights);
// Packs a share: the columns of each weight that Share::pieces hands out with these shares.
void pack(Weights weights, const Share& share);

// A core [columns, taps, depth], and a factor [rows, depth], whose rows are the columns of the product. They are packed
// later, by pack().
PackedWeight pack_core(c10::function_ref<at::Tensor()> core, int64_t columns, int64_t taps, int64_t depth, DType dtype,
                       const KernelSet& kernel_set, const char* prepared = nullptr);
PackedWeight pack_matrix(const at::Tensor& factor, DType dtype, const KernelSet& kernel_set,
                         const char* prepared = nullptr);

// The bias [T], or CP's factors [R, K] with the tap first, as accumulators: rows of whole vectors, padded with zeros.
class SumRows {
 public:
  SumRows(const std::optional<at::Tensor>& bias, DType dtype, const KernelSet& kernel_set);
  SumRows(const at::Tensor& factor, DType dtype, const KernelSet& kernel_set);
  // From column `first` of row 0; nullptr when there is no bias.
  const void* data(int64_t first = 0) const { return memory_ ? memory_.get() + first * sum_bytes_ : nullptr; }

 private:
  void fill(const at::Tensor& source, int64_t rows, int64_t row_stride, int64_t columns, int64_t column_stride,
            DType dtype, const KernelSet& kernel_set);
  int64_t sum_bytes_ = 0;
  AlignedMemory memory_;
};

}  // namespace lowrank_ops
