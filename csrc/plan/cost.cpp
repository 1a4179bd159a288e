#include "plan/cost.h"

#include <algorithm>

namespace lowrank_ops {
namespace {

struct Stages {
  double in, middle, out;  // multiply-adds per image
};

Stages multiply_adds(const Problem& p, double in_pixels) {
  const double out_pixels = double(p.oh) * p.ow;
  const double taps = p.op == Op::kTucker ? double(p.r1) * p.r2 * p.kh * p.kw
                      : p.op == Op::kCP   ? double(p.r1) * (p.kh + p.kw)
                                          : 0.0;
  return {in_pixels * p.s * p.r1, out_pixels * taps, out_pixels * p.r2 * p.t};
}

double weights(const Problem& p) {
  const double core = p.op == Op::kTucker ? double(p.r1) * p.r2 * p.kh * p.kw
                      : p.op == Op::kCP   ? double(p.r1) * (p.kh + p.kw)
                                          : 0.0;
  return double(p.s) * p.r1 + core + double(p.r2) * p.t;
}

}  // namespace

double block_flops(const Problem& p) {
  const Stages stages = multiply_adds(p, double(p.h) * p.w);
  return 2.0 * p.n * (stages.in + stages.middle + stages.out);
}

double fused_flops(const Problem& p, const CpuTile& tile) {
  double in_pixels = double(p.h) * p.w;
  if (p.op != Op::kLinear) {
    const Axis rows(p.h, p.kh, p.stride[0], p.padding[0], p.dilation[0]);
    const Axis columns(p.w, p.kw, p.stride[1], p.padding[1], p.dilation[1]);
    const int64_t strip = (p.oh + tile.strips - 1) / tile.strips;
    const int64_t parts = (p.ow + tile.columns - 1) / tile.columns;
    const int64_t inside_rows = rows.end_inside() - rows.first_inside();
    const int64_t inside_columns = columns.end_inside() - columns.first_inside();
    in_pixels = double(std::min(rows.span(strip), inside_rows)) * tile.strips *
                std::min(columns.span(tile.columns), inside_columns) * parts;
  }
  const Stages stages = multiply_adds(p, in_pixels);
  return 2.0 * p.n * (stages.in + stages.middle + stages.out);
}

double block_bytes(const Problem& p) {
  const double elements = double(p.n) * (double(p.s) * p.h * p.w + double(p.t) * p.oh * p.ow) + weights(p);
  return elements * element_bytes(p.dtype);
}

double hidden_bytes(const Problem& p) {
  double elements = double(p.h) * p.w * p.r1;
  if (p.op == Op::kTucker) elements += double(p.oh) * p.ow * p.r2;
  if (p.op == Op::kCP) elements += (double(p.oh) * p.w + double(p.oh) * p.ow) * p.r1;
  return 2.0 * p.n * elements * element_bytes(p.dtype);
}

double fused_seconds(const Problem&, const CpuCaps&, const CpuTile&) { return 1; }
double chain_seconds(const Problem&, const CpuCaps&) { return 2; }

}  // namespace lowrank_ops
