#include "cpu/winograd.h"

namespace lowrank_ops {

PackedWeight pack_winograd(const WinogradKernels& kernels, c10::function_ref<at::Tensor()> core, int64_t r1, int64_t r2,
                           DType dtype, const Engine& engine, const char* prepared) {
  return PackedWeight(core, r2, {9, kernels.places(), kernels.pack}, r1, dtype, engine, prepared);
}

WinogradCore::WinogradCore(const PackedWeight& weight, const Problem& p, const CpuTile& tile, const Engine& engine)
    : engine_(engine),
      kernels_(engine.kernels->winograd(tile.winograd)),
      weight_(weight),
      channels_(round_up(p.r1, engine.kernels->lanes)),
      most_patches_(ceil_div(tile.rows, tile.winograd) * ceil_div(tile.columns, tile.winograd)) {}

int64_t WinogradCore::sums_bytes() const {
  const ComputeKernels& kernels = *engine_.kernels;
  return Scratch::padded(kernels_.places() * most_patches_ * kernels.panel_width * element_bytes(kernels.accumulator));
}

int64_t WinogradCore::scratch_bytes(int64_t threads) const {
  return Scratch::padded(kernels_.places() * most_patches_ * channels_ * element_bytes(engine_.kernels->element)) +
         threads * sums_bytes();
}

void WinogradCore::run(const ConvBlock& block, Team& team, const HiddenRows& hidden, int64_t row, int64_t rows,
                       int64_t columns, void* tile, void* scratch) const {
  const ComputeKernels& kernels = *engine_.kernels;
  const int64_t element = element_bytes(kernels.element), accumulator = element_bytes(kernels.accumulator);
  const int64_t outputs = kernels_.outputs, side = kernels_.side(), places = kernels_.places();
  const int64_t patch_rows = ceil_div(rows, outputs), row_patches = ceil_div(columns, outputs);
  const int64_t patches = patch_rows * row_patches;
  char* inputs = static_cast<char*>(scratch);
  char* all_sums = inputs + Scratch::padded(places * most_patches_ * channels_ * element);

  team.run([&](const Share& share) {
    WinogradInputCall input;
    input.channels = channels_;
    input.out_patches = patches;
    share.pieces(1, patch_rows, row_patches, 1, [&](int64_t, int64_t patch_row, int64_t first, int64_t count) {
      input.columns = hidden.span() - outputs * first;
      input.patches = count;
      // Below the last row that an output needs nothing is wanted: any finite values do.
      for (int64_t i = 0; i < side; ++i)
        input.rows[i] =
            hidden.row(row + std::min(outputs * patch_row + i, rows + 1)) + outputs * first * hidden.pixel_bytes();
      input.out = inputs + (patch_row * row_patches + first) * channels_ * element;
      kernels_.input(input);
    });
  });

  const Panels& panels = weight_.panels();
  team.run([&](const Share& share) {
    char* sums = all_sums + share.index * sums_bytes();
    GemmCall call;
    call.num_taps = 1;
    call.depth = weight_.padded_depth();
    call.row_stride = channels_;
    call.out_type = kernels.accumulator;
    call.bias = nullptr;
    call.activation = Activation::kNone;
    WinogradOutputCall output;
    output.out_stride = block.tile_columns();
    share.pieces(panels.count, 1, patches, kFewestPixels, [&](int64_t panel, int64_t, int64_t begin, int64_t count) {
      const int64_t width = panels.padded_width(panel);  // whole vectors: the output transform reads them
      call.rows = count;
      call.width = call.out_stride = width;
      const char* weight = static_cast<const char*>(weight_.panel(panel));
      for (int64_t place = 0; place < places; ++place) {
        const void* source = inputs + (place * patches + begin) * channels_ * element;
        call.taps = &source;
        call.weight = weight + place * call.depth * width * element;
        call.out = sums + place * count * width * accumulator;
        hidden.ahead().attach(call);
        engine_.gemm(call);
      }
      output.width = output.sums_stride = width;
      output.sums_patches = count;
      // The sums patch row by patch row; a team cuts the first and the last of its share.
      for (int64_t patch = begin; patch < begin + count; patch += output.patches) {
        const int64_t top = outputs * (patch / row_patches), column = outputs * (patch % row_patches);
        output.patches = std::min(begin + count, (patch / row_patches + 1) * row_patches) - patch;
        output.columns = std::min(outputs * output.patches, columns - column);
        output.sums = sums + (patch - begin) * width * accumulator;
        for (int64_t i = 0; i < outputs; ++i)
          output.out[i] = top + i < rows
                              ? static_cast<char*>(tile) +
                                    (((top + i) * columns + column) * output.out_stride + panels.first(panel)) * element
                              : nullptr;
        kernels_.output(output);
      }
    });
  });
}

}  // namespace lowrank_ops
