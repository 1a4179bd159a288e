#include "plan/cpu/cost.h"

#include <algorithm>

namespace lowrank_ops {
namespace {

// The number of Winograd's patches per image.
double winograd_patches(const Problem& p, Winograd winograd) {
  const Patch patch = patch_of(winograd);
  return double(ceil_div(p.oh, patch.rows)) * double(ceil_div(p.ow, patch.columns));
}
Stages fused_stages(const Problem& p, const CpuTile& tile, double in_pixels) {
  Stages stages = multiply_adds(p, in_pixels);
  const Winograd winograd = tile.winograd;
  if (winograd != Winograd::kNone)
    stages.middle =
        double(patch_of(winograd).places * tap_groups(winograd, p.kw)) * winograd_patches(p, winograd) * p.r1 * p.r2 +
        winograd_sums(p, winograd);
  return stages;
}

}  // namespace

double fused_flops(const Problem& p, const CpuTile& tile) {
  double in_pixels = double(p.h) * p.w;
  if (p.op != Op::kLinear) {
    const Axis rows = row_axis(p), columns = column_axis(p);
    const int64_t strip = (p.oh + tile.strips - 1) / tile.strips;
    const int64_t parts = (p.ow + tile.columns - 1) / tile.columns;
    const int64_t inside_rows = rows.end_inside() - rows.first_inside();
    const int64_t inside_columns = columns.end_inside() - columns.first_inside();
    in_pixels = double(std::min(rows.span(strip), inside_rows)) * tile.strips *
                std::min(columns.span(tile.columns), inside_columns) * parts;
  }
  const Stages stages = fused_stages(p, tile, in_pixels);
  return 2.0 * p.n * (stages.in + stages.middle + stages.out);
}

// Additions of the transforms (cpu/kernels/winograd.h), per patch: about as many for the input transform of one channel
// of R1 as for the output transform of one channel of R2.
double winograd_sums(const Problem& p, Winograd winograd) {
  if (winograd == Winograd::kNone) return 0;
  const double sums = winograd == Winograd::k2x2 ? 24 : winograd == Winograd::k4x4 ? 140 : 10;
  return sums * winograd_patches(p, winograd) * double(p.r1 + p.r2);
}

double fused_products(const Problem& p, const CpuTile& tile) {
  return fused_flops(p, tile) / 2 - double(p.n) * (depthwise_sums(p) + winograd_sums(p, tile.winograd));
}

double strip_multiply_adds(const Problem& p, const CpuTile& tile, int64_t first, int64_t last) {
  const Axis rows = row_axis(p), columns = column_axis(p);
  const int64_t top = std::max(first * rows.stride, rows.first_inside());
  const int64_t bottom = std::min(first * rows.stride + rows.span(last - first), rows.end_inside());
  const int64_t inside_columns = columns.end_inside() - columns.first_inside();
  const double in_pixels =
      double(std::max<int64_t>(bottom - top, 0)) * std::min(columns.span(tile.columns), inside_columns);
  const Stages stages = fused_stages(p, tile, in_pixels);
  const double part = double(last - first) / p.oh * std::min(1.0, double(tile.columns) / p.ow);
  return stages.in + (stages.middle + stages.out) * part;
}

}  // namespace lowrank_ops
