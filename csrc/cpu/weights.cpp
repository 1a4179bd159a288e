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

namespace {
constexpr int64_t kKeptBytes = 4 << 20;  // a thread keeps a buffer of at most this size between calls
struct Kept {
  char* data = nullptr;
  int64_t bytes = 0;
  bool busy = false;
  ~Kept() { std::free(data); }
};
thread_local Kept kept;

char* allocate(int64_t bytes) {
  void* data = std::aligned_alloc(64, size_t(round_up(std::max<int64_t>(bytes, 64), 64)));
  TORCH_CHECK_WITH(OutOfMemoryError, data, "lowrank_ops: could not allocate ", bytes, " bytes of scratch memory");
  return static_cast<char*>(data);
}
}  // namespace

Scratch::Scratch(int64_t bytes) : owned_(kept.busy || bytes > kKeptBytes) {
  if (owned_) {
    begin_ = allocate(bytes);
  } else {
    if (kept.bytes < bytes) {
      std::free(kept.data);
      kept.data = nullptr;
      kept.bytes = 0;
      kept.data = allocate(bytes);
      kept.bytes = bytes;
    }
    kept.busy = true;
    begin_ = kept.data;
  }
  next_ = begin_;
  end_ = begin_ + round_up(std::max<int64_t>(bytes, 64), 64);
}

Scratch::~Scratch() {
  if (owned_)
    std::free(begin_);
  else
    kept.busy = false;
}

void* Scratch::take(int64_t bytes) {
  char* result = next_;
  next_ += padded(bytes);
  TORCH_INTERNAL_ASSERT(next_ <= end_, "lowrank_ops: scratch memory was counted too small");
  return result;
}

PackedWeight::PackedWeight(c10::function_ref<at::Tensor()> weight, int64_t columns, int64_t num_taps, int64_t depth,
                           DType dtype, const Engine& engine, const char* prepared)
    : panels_(columns, *engine.kernels),
      padded_depth_(round_up(depth, engine.kernels->group)),
      column_bytes_(num_taps * padded_depth_ * element_bytes(engine.kernels->element)),
      data_(prepared) {
  if (prepared) return;
  memory_.reset(allocate(bytes()));
  data_ = memory_.get();
  const PackFunction pack = engine.kernels->pack[int(dtype)];
  const at::Tensor values = weight();
  const char* source = static_cast<const char*>(values.const_data_ptr());
  const int64_t row_bytes = num_taps * depth * element_bytes(dtype);
  const int64_t grain = std::max<int64_t>(1, (256 << 10) / (column_bytes_ * panels_.padded_width(0)));
  at::parallel_for(0, panels_.count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      PackCall call;
      call.weight = source + panels_.first(panel) * row_bytes;
      call.row_stride = num_taps * depth;
      call.num_taps = num_taps;
      call.depth = depth;
      call.padded_depth = padded_depth_;
      call.width = panels_.width(panel);
      call.padded_width = panels_.padded_width(panel);
      call.panel = memory_.get() + panels_.first(panel) * column_bytes_;
      pack(call);
    }
  });
}

PackedWeight pack_matrix(const at::Tensor& factor, DType dtype, const Engine& engine, const char* prepared) {
  const auto weight = [&] { return factor.contiguous(); };
  return PackedWeight(weight, factor.size(0), 1, factor.size(1), dtype, engine, prepared);
}

SumRows::SumRows(const std::optional<at::Tensor>& bias, DType dtype, const Engine& engine) {
  if (bias) fill(*bias, 1, 0, bias->size(0), bias->stride(0), dtype, engine);
}

SumRows::SumRows(const at::Tensor& factor, DType dtype, const Engine& engine) {
  fill(factor, factor.size(1), factor.stride(1), factor.size(0), factor.stride(0), dtype, engine);
}

void SumRows::fill(const at::Tensor& source, int64_t rows, int64_t row_stride, int64_t columns, int64_t column_stride,
                   DType dtype, const Engine& engine) {
  sum_bytes_ = element_bytes(engine.sums->element);
  const int64_t padded = round_up(columns, engine.sums->lanes);
  memory_.reset(allocate(rows * padded * sum_bytes_));
  if (padded != columns) std::memset(memory_.get(), 0, size_t(rows * padded * sum_bytes_));
  LoadCall load;
  load.in = source.const_data_ptr();
  load.pixel_stride = row_stride;
  load.channel_stride = column_stride;
  load.pixels = rows;
  load.channels = columns;
  load.tile = memory_.get();
  load.tile_stride = padded;
  engine.sums->load[int(dtype)](load);
}

}  // namespace lowrank_ops
