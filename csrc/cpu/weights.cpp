#include "cpu/weights.h"

#include <ATen/Parallel.h>

#include <cstring>

namespace lowrank_ops {

Panels::Panels(int64_t columns, const ComputeKernels& kernels) : columns(columns), lanes(kernels.lanes) {
  const int64_t vectors = (columns + lanes - 1) / lanes, most = kernels.panel_width / lanes;
  count = (vectors + most - 1) / most;
  base = vectors / count;
  extra = vectors % count;
}

PackedWeight::PackedWeight(c10::function_ref<at::Tensor()> weight, int64_t columns, PackedTaps taps, int64_t depth,
                           DType dtype, const KernelSet& kernel_set, const char* prepared)
    : panels_(columns, *kernel_set.kernels),
      taps_(taps),
      depth_(depth),
      padded_depth_(round_up(depth, kernel_set.kernels->group)),
      column_bytes_(taps.packed * padded_depth_ * element_bytes(kernel_set.kernels->element)),
      row_bytes_(taps.stored * depth * element_bytes(dtype)),
      lane_bytes_(kernel_set.kernels->group * element_bytes(kernel_set.kernels->element)),
      data_(prepared) {
  if (prepared) return;
  memory_ = allocate(bytes());
  data_ = memory_.get();
  values_ = weight();
}

void PackedWeight::pack(int64_t first, int64_t last) const {
  PackCall call;
  call.row_stride = taps_.stored * depth_;
  call.num_taps = taps_.stored;
  call.depth = depth_;
  call.padded_depth = padded_depth_;
  for (int64_t panel = 0; panel < panels_.count; ++panel) {
    const int64_t begin = std::max(first * panels_.lanes, panels_.first(panel));
    const int64_t end = std::min(last * panels_.lanes, panels_.first(panel) + panels_.padded_width(panel));
    if (begin >= end) continue;
    call.weight = static_cast<const char*>(values_.const_data_ptr()) + begin * row_bytes_;
    call.width = std::min(end, panels_.columns) - begin;
    call.padded_width = end - begin;
    call.panel_stride = panels_.padded_width(panel);
    call.panel =
        memory_.get() + own() + panels_.first(panel) * column_bytes_ + (begin - panels_.first(panel)) * lane_bytes_;
    taps_.pack(call);
  }
}

void PackedWeight::copy_for_each(int64_t threads) {
  copies_ = threads;
  memory_ = allocate(copies_ * Scratch::padded(bytes()));
  data_ = memory_.get();
}

bool needs_packing(Weights weights) {
  return std::any_of(weights.begin(), weights.end(),
                     [](const auto* weight) { return weight && weight->unpacked() > 0; });
}

void pack(Weights weights, const Share& share) {
  for (const PackedWeight* weight : weights)
    if (weight)
      weight->pack(weight->unpacked() * share.index / share.count,
                   weight->unpacked() * (share.index + 1) / share.count);
}

void pack(Weights weights) {
  constexpr int64_t kGrainBytes = 128 << 10;
  int64_t vectors = 0, bytes = 0;
  for (const PackedWeight* weight : weights)
    if (weight && weight->unpacked() > 0) {
      vectors += weight->unpacked();
      bytes += weight->bytes();
    }
  if (vectors == 0) return;
  at::parallel_for(0, vectors, std::max<int64_t>(1, kGrainBytes * vectors / bytes), [&](int64_t begin, int64_t end) {
    for (const PackedWeight* weight : weights) {
      if (!weight) continue;
      const int64_t own = weight->unpacked();
      weight->pack(std::clamp<int64_t>(begin, 0, own), std::clamp<int64_t>(end, 0, own));
      begin -= own;
      end -= own;
    }
  });
}

bool pack_for_tasks(Weights weights, int64_t tasks) {
  if (!needs_packing(weights)) return false;
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), tasks);
  if (threads == 1) {  // the thread that packs is the one that reads
    pack_own(weights);
    return false;
  }
  int64_t bytes = 0;
  for (const PackedWeight* weight : weights)
    if (weight && weight->unpacked() > 0) bytes += weight->bytes();
  if (bytes * at::get_num_threads() > kMostKeptBytes) {  // the copies would be fresh pages at every call
    pack(weights);
    return false;
  }
  for (PackedWeight* weight : weights)
    if (weight && weight->unpacked() > 0) weight->copy_for_each(at::get_num_threads());
  return true;
}

void pack_own(Weights weights) {
  pack(weights, Share{});
}

PackedWeight pack_core(c10::function_ref<at::Tensor()> core, int64_t columns, int64_t taps, int64_t depth, DType dtype,
                       const KernelSet& kernel_set, const char* prepared) {
  return PackedWeight(core, columns, {taps, taps, kernel_set.kernels->pack[int(dtype)]}, depth, dtype, kernel_set,
                      prepared);
}

PackedWeight pack_matrix(const at::Tensor& factor, DType dtype, const KernelSet& kernel_set, const char* prepared) {
  const auto weight = [&] { return factor.contiguous(); };
  return pack_core(weight, factor.size(0), 1, factor.size(1), dtype, kernel_set, prepared);
}

SumRows::SumRows(const std::optional<at::Tensor>& bias, DType dtype, const KernelSet& kernel_set) {
  if (bias) fill(*bias, 1, 0, bias->size(0), bias->stride(0), dtype, kernel_set);
}

SumRows::SumRows(const at::Tensor& factor, DType dtype, const KernelSet& kernel_set) {
  fill(factor, factor.size(1), factor.stride(1), factor.size(0), factor.stride(0), dtype, kernel_set);
}

void SumRows::fill(const at::Tensor& source, int64_t rows, int64_t row_stride, int64_t columns, int64_t column_stride,
                   DType dtype, const KernelSet& kernel_set) {
  sum_bytes_ = element_bytes(kernel_set.sums->element);
  const int64_t padded = round_up(columns, kernel_set.sums->lanes);
  memory_ = allocate(rows * padded * sum_bytes_);
  if (padded != columns) std::memset(memory_.get(), 0, size_t(rows * padded * sum_bytes_));
  LoadCall load;
  load.in = source.const_data_ptr();
  load.pixel_stride = row_stride;
  load.channel_stride = column_stride;
  load.pixels = rows;
  load.channels = columns;
  load.tile = memory_.get();
  load.tile_stride = padded;
  kernel_set.sums->load[int(dtype)](load);
}

}  // namespace lowrank_ops
