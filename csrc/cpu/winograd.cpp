#include "cpu/winograd.h"

#include <c10/util/SmallVector.h>

namespace lowrank_ops {

PackedWeight pack_winograd(Winograd winograd, c10::function_ref<at::Tensor()> core, const Problem& p,
                           const Engine& engine, const char* prepared) {
  const int64_t packed = patch_of(winograd).places * tap_groups(winograd, p.kw);
  return PackedWeight(core, p.r2, {p.kh * p.kw, packed, engine.kernels->winograd[int(winograd)].pack}, p.r1, p.dtype,
                      engine, prepared);
}

WinogradCore::WinogradCore(const PackedWeight& weight, const Problem& p, const CpuTile& tile, const Engine& engine)
    : engine_(engine),
      kernels_(engine.kernels->winograd[int(tile.winograd)]),
      weight_(weight),
      patch_(patch_of(tile.winograd)),
      groups_(tap_groups(tile.winograd, p.kw)),
      channels_(round_up(p.r1, engine.kernels->lanes)) {
  const int64_t patch_rows = ceil_div(tile.rows, patch_.rows), row_patches = ceil_div(tile.columns, patch_.columns);
  most_patches_ = patch_rows * row_patches;
  most_inputs_ = patch_rows * (row_patches + groups_ - 1);
}

int64_t WinogradCore::sums_bytes() const {
  const ComputeKernels& kernels = *engine_.kernels;
  return Scratch::padded(patch_.places * most_patches_ * kernels.panel_width * element_bytes(kernels.accumulator));
}

int64_t WinogradCore::scratch_bytes(int64_t threads) const {
  return Scratch::padded(patch_.places * most_inputs_ * channels_ * element_bytes(engine_.kernels->element)) +
         threads * sums_bytes();
}

void WinogradCore::run(const ConvBlock& block, Team& team, const HiddenRows& hidden, int64_t row, int64_t rows,
                       int64_t columns, void* tile, void* scratch) const {
  const ComputeKernels& kernels = *engine_.kernels;
  const int64_t element = element_bytes(kernels.element), accumulator = element_bytes(kernels.accumulator);
  const int64_t patch_rows = ceil_div(rows, patch_.rows), row_patches = ceil_div(columns, patch_.columns);
  const int64_t patches = patch_rows * row_patches;
  const int64_t row_inputs = row_patches + groups_ - 1, input_patches = patch_rows * row_inputs;
  char* inputs = static_cast<char*>(scratch);
  char* all_sums = inputs + Scratch::padded(patch_.places * most_inputs_ * channels_ * element);

  team.run([&](const Share& share) {
    WinogradInputCall input;
    input.channels = channels_;
    input.out_patches = input_patches;
    // Below the last row that an output needs nothing is wanted: any finite values do.
    const int64_t last_row = block.rows.span(rows) - 1;
    share.pieces(1, patch_rows, row_inputs, 1, [&](int64_t, int64_t patch_row, int64_t first, int64_t count) {
      input.columns = hidden.columns().span - patch_.columns * first;
      input.patches = count;
      for (int64_t i = 0; i < kernels_.input_rows; ++i)
        input.rows[i] = hidden.row(row + std::min(patch_.rows * patch_row + i, last_row)) +
                        patch_.columns * first * hidden.pixel_bytes();
      input.out = inputs + (patch_row * row_inputs + first) * channels_ * element;
      kernels_.input(input);
    });
  });

  const Panels& panels = weight_.panels();
  team.run([&](const Share& share) {
    char* sums = all_sums + share.index * sums_bytes();
    GemmCall call;
    call.row_stride = channels_;
    call.out_type = kernels.accumulator;
    call.bias = nullptr;
    call.activation = Activation::kNone;
    WinogradOutputCall output;
    output.out_stride = block.tile_columns();
    // Channels that fill their vectors make one run of all groups.
    const bool joined = weight_.padded_depth() == channels_;
    c10::SmallVector<const void*, 32> taps(joined ? 1 : groups_);
    call.taps = taps.data();
    call.num_taps = int64_t(taps.size());
    call.depth = weight_.padded_depth() * (joined ? groups_ : 1);
    const auto multiply = [&](int64_t panel, int64_t patch_row, int64_t begin, int64_t count) {
      const int64_t width = panels.padded_width(panel);  // whole vectors: the output transform reads them
      call.rows = count;
      call.width = call.out_stride = width;
      const char* weight = static_cast<const char*>(weight_.panel(panel));
      const int64_t place_bytes = groups_ * weight_.padded_depth() * width * element;
      for (int64_t place = 0; place < patch_.places; ++place) {
        const char* source = inputs + (place * input_patches + patch_row * row_inputs + begin) * channels_ * element;
        for (int64_t tap = 0; tap < call.num_taps; ++tap) taps[tap] = source + tap * channels_ * element;
        call.weight = weight + place * place_bytes;
        call.out = sums + place * count * width * accumulator;
        hidden.ahead().attach(call);
        if (place + 1 < patch_.places)
          hidden.ahead().attach_weight(call, static_cast<const char*>(call.weight) + place_bytes, place_bytes, 0, 1);
        else
          hidden.ahead().attach_next_panel(call, weight_, &block.out_weight, panel, 0, 1);
        engine_.gemm(call);
      }
      output.width = output.sums_stride = width;
      output.sums_patches = count;
      // The sums patch row by patch row; a team cuts the first and the last of its share.
      const int64_t first = patch_row * row_patches + begin;
      for (int64_t patch = first; patch < first + count; patch += output.patches) {
        const int64_t top = patch_.rows * (patch / row_patches), column = patch_.columns * (patch % row_patches);
        output.patches = std::min(first + count, (patch / row_patches + 1) * row_patches) - patch;
        output.columns = std::min(patch_.columns * output.patches, columns - column);
        output.sums = sums + (patch - first) * width * accumulator;
        for (int64_t i = 0; i < patch_.rows; ++i)
          output.out[i] = top + i < rows
                              ? static_cast<char*>(tile) +
                                    (((top + i) * columns + column) * output.out_stride + panels.first(panel)) * element
                              : nullptr;
        kernels_.output(output);
      }
    };
    // All rows of patches are one run, unless a row's inputs are more than its patches.
    const bool one_run = row_inputs == row_patches;
    share.pieces(panels.count, one_run ? 1 : patch_rows, one_run ? patches : row_patches, kFewestPixels, multiply);
  });
}

}  // namespace lowrank_ops
