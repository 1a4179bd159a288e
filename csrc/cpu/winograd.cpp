#include "cpu/winograd.h"

namespace lowrank_ops {
namespace {

constexpr int64_t kPlaces = 16;

int64_t pairs(int64_t count) {
  return (count + 1) / 2;
}

}  // namespace

PackedWeight pack_winograd(c10::function_ref<at::Tensor()> core, int64_t r1, int64_t r2, DType dtype,
                           const Engine& engine, const char* prepared) {
  return PackedWeight(core, r2, {9, kPlaces, engine.kernels->pack_winograd}, r1, dtype, engine, prepared);
}

WinogradCore::WinogradCore(const PackedWeight& weight, const Problem& p, const CpuTile& tile, const Engine& engine)
    : engine_(engine),
      weight_(weight),
      channels_(round_up(p.r1, engine.kernels->lanes)),
      most_patches_(pairs(tile.rows) * pairs(tile.columns)) {}

int64_t WinogradCore::sums_bytes() const {
  const ComputeKernels& kernels = *engine_.kernels;
  return Scratch::padded(kPlaces * most_patches_ * kernels.panel_width * element_bytes(kernels.accumulator));
}

int64_t WinogradCore::scratch_bytes(int64_t threads) const {
  return Scratch::padded(kPlaces * most_patches_ * channels_ * element_bytes(engine_.kernels->element)) +
         threads * sums_bytes();
}

void WinogradCore::run(const ConvBlock& block, Team& team, const HiddenRows& hidden, int64_t row, int64_t rows,
                       int64_t columns, void* tile, void* scratch) const {
  const ComputeKernels& kernels = *engine_.kernels;
  const int64_t element = element_bytes(kernels.element), accumulator = element_bytes(kernels.accumulator);
  const int64_t row_patches = pairs(columns), patches = pairs(rows) * row_patches;
  char* inputs = static_cast<char*>(scratch);
  char* all_sums = inputs + Scratch::padded(kPlaces * most_patches_ * channels_ * element);

  team.run([&](const Share& share) {
    WinogradInputCall input;
    input.channels = channels_;
    input.out_patches = patches;
    share.pieces(1, pairs(rows), row_patches, 1, [&](int64_t, int64_t pair, int64_t first, int64_t count) {
      input.columns = hidden.span() - 2 * first;
      input.patches = count;
      // The fourth row below an odd last output: nothing reads what it would give.
      for (int64_t i = 0; i < 4; ++i)
        input.rows[i] = hidden.row(row + std::min(2 * pair + i, rows + 1)) + 2 * first * hidden.pixel_bytes();
      input.out = inputs + (pair * row_patches + first) * channels_ * element;
      kernels.winograd_input(input);
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
      for (int64_t place = 0; place < kPlaces; ++place) {
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
        const int64_t pair = patch / row_patches, column = 2 * (patch % row_patches);
        output.patches = std::min(begin + count, (pair + 1) * row_patches) - patch;
        output.columns = std::min(2 * output.patches, columns - column);
        output.sums = sums + (patch - begin) * width * accumulator;
        for (int64_t i = 0; i < 2; ++i)
          output.out[i] =
              2 * pair + i < rows
                  ? static_cast<char*>(tile) +
                        (((2 * pair + i) * columns + column) * output.out_stride + panels.first(panel)) * element
                  : nullptr;
        kernels.winograd_output(output);
      }
    });
  });
}

}  // namespace lowrank_ops
