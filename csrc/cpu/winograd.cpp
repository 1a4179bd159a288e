#include "cpu/winograd.h"

#include <c10/util/SmallVector.h>

#include <algorithm>

namespace lowrank_ops {

PackedWeight pack_winograd(Winograd winograd, c10::function_ref<at::Tensor()> core, const Problem& p,
                           const KernelSet& kernel_set, const char* prepared) {
  const int64_t packed = patch_of(winograd).places * tap_groups(winograd, p.kw);
  return PackedWeight(core, p.r2, {p.kh * p.kw, packed, kernel_set.kernels->winograd[int(winograd)].pack}, p.r1,
                      p.dtype, kernel_set, prepared);
}

// The patches of `rows` output rows from `row`, and where they are kept.
struct WinogradCore::Step {
  const HiddenRows& hidden;
  int64_t row, rows, columns;
  int64_t patch_rows, row_patches;  // rows of patches; patches in a row
  // Patches of the input per row: row_patches, and for lines the ones after them, which only the last outputs read.
  int64_t row_inputs;
  char* tile;
  char* inputs;  // transformed: [places, input_patches(), channels_] of elements
  char* sums;    // of all threads

  int64_t input_patches() const { return patch_rows * row_inputs; }
};

WinogradCore::WinogradCore(const ConvBlock& block)
    : block_(block),
      weight_(*block.core_weight),
      kernels_(block.kernel_set.kernels->winograd[int(block.tile.winograd)]),
      patch_(patch_of(block.tile.winograd)),
      groups_(tap_groups(block.tile.winograd, block.problem.kw)),
      channels_(round_up(block.problem.r1, block.kernel_set.kernels->lanes)),
      element_bytes_(element_bytes(block.kernel_set.kernels->element)),
      sum_bytes_(element_bytes(block.kernel_set.kernels->accumulator)) {
  const int64_t patch_rows = ceil_div(block.tile.rows, patch_.rows);
  const int64_t row_patches = ceil_div(block.tile.columns, patch_.columns);
  most_patches_ = patch_rows * row_patches;
  most_inputs_ = patch_rows * (row_patches + groups_ - 1);
}

int64_t WinogradCore::inputs_bytes() const {
  return Scratch::padded(patch_.places * most_inputs_ * channels_ * element_bytes_);
}

int64_t WinogradCore::sums_bytes() const {
  return Scratch::padded(patch_.places * most_patches_ * block_.kernel_set.kernels->panel_width * sum_bytes_);
}

int64_t WinogradCore::scratch_bytes(int64_t threads) const {
  return inputs_bytes() + threads * sums_bytes();
}

void WinogradCore::transform_inputs(const Step& step, const Share& share) const {
  WinogradInputCall call;
  call.channels = channels_;
  call.out_patches = step.input_patches();
  // No output reads what lies below this row: a patch may find any finite values there.
  const int64_t last_row = block_.rows.span(step.rows) - 1;
  share.pieces(1, step.patch_rows, step.row_inputs, 1, [&](int64_t, int64_t patch_row, int64_t first, int64_t count) {
    call.columns = step.hidden.columns().span - patch_.columns * first;
    call.patches = count;
    for (int64_t i = 0; i < kernels_.input_rows; ++i)
      call.rows[i] = step.hidden.row(step.row + std::min(patch_.rows * patch_row + i, last_row)) +
                     patch_.columns * first * step.hidden.pixel_bytes();
    call.out = step.inputs + (patch_row * step.row_inputs + first) * channels_ * element_bytes_;
    kernels_.input(call);
  });
}

// One thread's products, a GEMM per place, and their way back to output pixels.
class WinogradCore::Products {
 public:
  Products(const WinogradCore& core, const Step& step, char* sums)
      : core_(core),
        weight_(core.weight_),
        step_(step),
        sums_(sums),
        // Channels that fill their vectors make one run of all groups.
        joined_(weight_.padded_depth() == core.channels_),
        taps_(joined_ ? 1 : core.groups_) {
    call_.row_stride = core.channels_;
    call_.out_type = core.block_.kernel_set.kernels->accumulator;
    call_.bias = nullptr;
    call_.activation = Activation::kNone;
    call_.taps = taps_.data();
    call_.num_taps = int64_t(taps_.size());
    call_.depth = weight_.padded_depth() * (joined_ ? core.groups_ : 1);
  }

  // `count` patches from number `first` of a row of patches -> `sums_` [places, count, padded width of the panel].
  void multiply(int64_t panel, int64_t patch_row, int64_t first, int64_t count) {
    const int64_t width = weight_.panels().padded_width(panel);  // whole vectors: the output transform reads them
    call_.rows = count;
    call_.width = call_.out_stride = width;
    const char* weight = static_cast<const char*>(weight_.panel(panel));
    const int64_t places = core_.patch_.places, pixel_bytes = core_.channels_ * core_.element_bytes_;
    const int64_t place_bytes = core_.groups_ * weight_.padded_depth() * width * core_.element_bytes_;
    Prefetcher& prefetcher = step_.hidden.prefetcher();
    for (int64_t place = 0; place < places; ++place) {
      const char* source =
          step_.inputs + (place * step_.input_patches() + patch_row * step_.row_inputs + first) * pixel_bytes;
      for (int64_t tap = 0; tap < call_.num_taps; ++tap) taps_[tap] = source + tap * pixel_bytes;
      call_.weight = weight + place * place_bytes;
      call_.out = sums_ + place * count * width * core_.sum_bytes_;
      prefetcher.attach(call_);
      if (place + 1 < places)
        prefetcher.attach_weight(call_, static_cast<const char*>(call_.weight) + place_bytes, place_bytes, 0, 1);
      else
        prefetcher.attach_next_panel(call_, weight_, &core_.block_.out_weight, panel, 0, 1);
      core_.block_.kernel_set.gemm(call_);
    }
  }

  // The sums of multiply() -> tile. One row of patches at a time; a team divides the first and the last of its share.
  void transform_outputs(int64_t panel, int64_t patch_row, int64_t first, int64_t count) const {
    const Patch& patch = core_.patch_;
    const Panels& panels = weight_.panels();
    WinogradOutputCall call;
    call.out_stride = core_.block_.tile_columns();
    call.width = call.sums_stride = panels.padded_width(panel);
    call.sums_patches = count;
    const int64_t begin = patch_row * step_.row_patches + first, end = begin + count;
    for (int64_t index = begin; index < end; index += call.patches) {
      const int64_t line = index / step_.row_patches;
      const int64_t top = patch.rows * line, column = patch.columns * (index % step_.row_patches);
      call.patches = std::min(end, (line + 1) * step_.row_patches) - index;
      call.columns = std::min(patch.columns * call.patches, step_.columns - column);
      call.sums = sums_ + (index - begin) * call.width * core_.sum_bytes_;
      for (int64_t i = 0; i < patch.rows; ++i) {
        const int64_t pixel = (top + i) * step_.columns + column;
        call.out[i] = top + i < step_.rows
                          ? step_.tile + (pixel * call.out_stride + panels.first(panel)) * core_.element_bytes_
                          : nullptr;
      }
      core_.kernels_.output(call);
    }
  }

 private:
  const WinogradCore& core_;
  const PackedWeight& weight_;
  const Step& step_;
  char* const sums_;
  const bool joined_;
  c10::SmallVector<const void*, 32> taps_;
  GemmCall call_;
};

void WinogradCore::run(Team& team, const HiddenRows& hidden, int64_t row, int64_t rows, int64_t columns, void* tile,
                       void* scratch) const {
  const int64_t row_patches = ceil_div(columns, patch_.columns);
  char* inputs = static_cast<char*>(scratch);
  const Step step{hidden,
                  row,
                  rows,
                  columns,
                  ceil_div(rows, patch_.rows),
                  row_patches,
                  row_patches + groups_ - 1,
                  static_cast<char*>(tile),
                  inputs,
                  inputs + inputs_bytes()};
  team.run([&](const Share& share) { transform_inputs(step, share); });
  // All rows of patches are one run, unless a row's inputs are more than its patches.
  const bool one_run = step.row_inputs == row_patches;
  team.run([&](const Share& share) {
    Products products(*this, step, step.sums + share.index * sums_bytes());
    share.pieces(weight_.panels().count, one_run ? 1 : step.patch_rows,
                 one_run ? step.patch_rows * row_patches : row_patches, kFewestPixels,
                 [&](int64_t panel, int64_t patch_row, int64_t first, int64_t count) {
                   products.multiply(panel, patch_row, first, count);
                   products.transform_outputs(panel, patch_row, first, count);
                 });
  });
}

}  // namespace lowrank_ops
