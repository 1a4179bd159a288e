#include "cpu/prefetcher.h"

#include <algorithm>

#include "cpu/kernels/prefetch.h"

namespace lowrank_ops {
namespace {

constexpr int64_t kMostWeightBytes = 128 << 10;  // of the next weight that are prefetched
constexpr int64_t kBytesAtOnce = 2048;           // up to here a row is prefetched before a call, not spread over it

}  // namespace

void Prefetcher::begin(const MemoryRows& output, const MemoryRows& input, double multiply_adds) {
  regions_ = {output, input};
  for (MemoryRows& region : regions_)
    if (region.count > 1 && region.stride == region.bytes) region = {region.first, 1, region.count * region.bytes, 0};
  region_ = row_ = byte_ = 0;
  due_ = 0;
  rate_ = double(output.count * output.bytes + input.count * input.bytes) / multiply_adds;
}

void Prefetcher::attach(GemmCall& call) {
  call.prefetch_lines = 0;
  if (region_ == 2) return;
  due_ += rate_ * double(call.num_taps * call.depth) * double(call.rows * call.width);
  // A call takes one run of lines. Short rows before it are prefetched at once: a step of few calls (CP, narrow images)
  // has more rows than calls.
  const char* next;
  int64_t left;
  while (true) {
    while (region_ < 2 && row_ >= regions_[size_t(region_)].count) {
      ++region_;
      row_ = byte_ = 0;
    }
    if (region_ == 2) return;
    const MemoryRows& rows = regions_[size_t(region_)];
    next = rows.first + row_ * rows.stride + byte_;
    left = rows.bytes - byte_;
    if (left > kBytesAtOnce || double(left) > due_) break;
    prefetch_rows</*kWrite=*/false>(next, 1, 0, left);
    due_ -= double(left);
    ++row_;
    byte_ = 0;
  }
  call.prefetch = next;
  call.prefetch_lines = std::min(int64_t(due_), left) / 64;
  due_ -= double(call.prefetch_lines * 64);
  byte_ += call.prefetch_lines * 64;
  if (left < 64 * (call.prefetch_lines + 1)) {
    ++row_;
    byte_ = 0;
  }
}

void Prefetcher::attach_weight(GemmCall& call, const void* next, int64_t bytes, int64_t part, int64_t parts) const {
  if (!weights_are_far || call.prefetch_lines > 0) return;
  const int64_t lines = std::min(bytes, kMostWeightBytes) / 64, first = lines * part / parts;
  call.prefetch = static_cast<const char*>(next) + 64 * first;
  call.prefetch_lines = lines * (part + 1) / parts - first;
}

void Prefetcher::attach_next_panel(GemmCall& call, const PackedWeight& weight, const PackedWeight* next_weight,
                                   int64_t panel, int64_t part, int64_t parts) const {
  if (!weights_are_far) return;
  const bool last = panel + 1 == weight.panels().count;
  if (last && next_weight == nullptr) return;
  const PackedWeight& next = last ? *next_weight : weight;
  const int64_t index = last ? 0 : panel + 1;
  attach_weight(call, next.panel(index), next.panel_bytes(index), part, parts);
}

}  // namespace lowrank_ops
