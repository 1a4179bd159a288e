#include "plan/counts.h"

namespace lowrank_ops {

int64_t element_bytes(DType dtype) {
  return dtype == DType::kDouble ? 8 : dtype == DType::kFloat ? 4 : 2;
}

Stages multiply_adds(const Problem& p, double in_pixels) {
  const double out_pixels = double(p.oh) * p.ow;
  const double core = p.op == Op::kTucker ? out_pixels * p.r1 * p.r2 * p.kh * p.kw : depthwise_sums(p);
  return {in_pixels * p.s * p.r1, core, out_pixels * p.r2 * p.t};
}

double depthwise_sums(const Problem& p) {
  return p.op == Op::kCP ? double(p.oh) * p.r1 * (double(p.w) * p.kh + double(p.ow) * p.kw) : 0.0;
}

double packed_elements(const Problem& p) {
  const double core = p.op == Op::kTucker ? double(p.r1) * p.r2 * p.kh * p.kw : 0.0;
  return double(p.s) * p.r1 + core + double(p.r2) * p.t;
}

double block_flops(const Problem& p) {
  const Stages stages = multiply_adds(p, double(p.h) * p.w);
  return 2.0 * p.n * (stages.in + stages.middle + stages.out);
}

double weight_elements(const Problem& p) {
  return packed_elements(p) + (p.op == Op::kCP ? double(p.r1) * (p.kh + p.kw) : 0.0);
}

double image_elements(const Problem& p) {
  return double(p.n) * (double(p.s) * p.h * p.w + double(p.t) * p.oh * p.ow);
}

double block_bytes(const Problem& p) {
  const double elements = image_elements(p) + weight_elements(p);
  return elements * element_bytes(p.dtype);
}

double hidden_bytes(const Problem& p) {
  double elements = double(p.h) * p.w * p.r1;
  if (p.op == Op::kTucker) elements += double(p.oh) * p.ow * p.r2;
  if (p.op == Op::kCP) elements += (double(p.oh) * p.w + double(p.oh) * p.ow) * p.r1;
  return 2.0 * p.n * elements * element_bytes(p.dtype);
}

}  // namespace lowrank_ops
