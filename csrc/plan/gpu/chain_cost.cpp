// The predicted time of the chain of library ops on a GPU (cost.h).
#include <algorithm>
#include <cmath>
#include <vector>

#include "plan/counts.h"
#include "plan/gpu/cost.h"

namespace lowrank_ops {
namespace {

#include "plan/gpu/cost_constants.inc"

constexpr double kLibraryPixels = 128, kLibraryColumns = 64,
                 kLibraryDepth = 256;  // a library's tile: pixels x columns; least depth per split
constexpr double kLibrarySplits = 8;

bool on_tensor_cores(const Problem& p) {
  return p.dtype == DType::kBFloat16 || p.dtype == DType::kHalf || (p.dtype == DType::kFloat && p.tf32);
}

double library_flops(const Problem& p, const GpuCaps& caps) {
  if (p.dtype == DType::kDouble) return caps.fp64_flops;
  if (!on_tensor_cores(p)) return caps.fp32_flops;
  const double rate = p.dtype == DType::kFloat ? caps.library_tf32_flops : caps.library_fp16_flops;
  return rate > 0 ? rate : caps.fp32_flops;
}

// One library call: a product of pixels x columns x depth, or a depthwise convolution of `depthwise` multiply-adds.
struct Call {
  double pixels = 0, columns = 0, depth = 0;
  double in_bytes = 0, out_bytes = 0, weight_bytes = 0, depthwise = 0;
};

std::vector<Call> calls_of(const Problem& p) {
  const double element = double(element_bytes(p.dtype));
  const double in_pixels = double(p.n) * p.h * p.w, out_pixels = double(p.n) * p.oh * p.ow;
  std::vector<Call> calls;
  const auto product = [&](double from, double pixels, double columns, double channels, double depth) {
    calls.push_back(
        {pixels, columns, depth, from * channels * element, pixels * columns * element, columns * depth * element, 0});
  };
  const auto depthwise = [&](double from, double pixels, double taps) {
    const double rank = double(p.r1);
    calls.push_back({pixels, rank, taps, from * rank * element, pixels * rank * element, rank * taps * element,
                     pixels * rank * taps});
  };
  product(in_pixels, in_pixels, double(p.r1), double(p.s), double(p.s));
  if (p.op == Op::kTucker) product(in_pixels, out_pixels, double(p.r2), double(p.r1), double(p.r1) * p.kh * p.kw);
  if (merges_depthwise(p)) {
    depthwise(in_pixels, out_pixels, double(p.kh) * p.kw);
  } else if (p.op == Op::kCP) {
    const double between = double(p.n) * p.oh * p.w;
    depthwise(in_pixels, between, double(p.kh));
    depthwise(between, out_pixels, double(p.kw));
  }
  product(out_pixels, out_pixels, double(p.t), double(p.r2), double(p.r2));
  return calls;
}

// Seconds of a call's products at the library's best rate: whole tiles, on those multiprocessors that get a tile.
double product_seconds(const Call& call, const Problem& p, const GpuCaps& caps) {
  const double tile_columns = call.columns <= kLibraryColumns / 2 ? kLibraryColumns / 2 : kLibraryColumns;
  const double ctas = std::ceil(call.pixels / kLibraryPixels) * std::ceil(call.columns / tile_columns);
  const double splits = std::clamp(std::floor(call.depth / kLibraryDepth), 1.0, kLibrarySplits);
  const double filled = std::min(1.0, ctas * splits / caps.multiprocessors);
  return 2.0 * ctas * kLibraryPixels * tile_columns * call.depth / (library_flops(p, caps) * filled);
}

}  // namespace

ChainFeatures chain_features(const Problem& p, const GpuCaps& caps) {
  const std::vector<Call> calls = calls_of(p);
  ChainFeatures found{};
  const double memory = caps.memory_bytes_per_second;
  // The output of the call before is still in L2 if it fits there.
  const auto moved = [&](double bytes, bool resident) { found[resident ? kWarmBytes : kColdBytes] += bytes / memory; };
  for (size_t i = 0; i < calls.size(); ++i) {
    const Call& call = calls[i];
    const bool resident = call.in_bytes + call.out_bytes <= caps.l2_bytes / 2.0;
    ++found[kKernels];
    moved(call.in_bytes, resident && i > 0);
    moved(call.out_bytes, resident && i + 1 < calls.size());
    moved(call.weight_bytes, false);
    if (call.depthwise > 0)
      found[kChainDepthwise] += 2 * call.depthwise / caps.fp32_flops;
    else
      found[kChainProducts] += product_seconds(call, p, caps);
    // Tensor cores want channels last: in NCHW the library transposes around its products.
    if (call.depthwise == 0 && p.op != Op::kLinear && p.layout == Layout::kContiguous && on_tensor_cores(p)) {
      ++found[kTransposes];
      found[kTransposedBytes] += (call.in_bytes + call.out_bytes) / memory;
    }
  }
  if (p.activation != Activation::kNone) {  // the activation is a kernel of its own
    ++found[kKernels];
    moved(2 * calls.back().out_bytes, 2 * calls.back().out_bytes <= caps.l2_bytes / 2.0);
  }
  return found;
}

Plan chain_plan(const Problem& p, const GpuCaps& caps) {
  Plan plan;
  plan.path = Path::kChain;
  plan.kernel = "chain of torch ops";
  plan.flops = block_flops(p);
  plan.bytes = block_bytes(p) + hidden_bytes(p);
  const ChainFeatures features = chain_features(p, caps);
  const ChainConstants& constants = p.op == Op::kLinear ? kChainLinear : kChainConvolutions;
  for (int i = 0; i < kChainFeatures; ++i) plan.gpu_seconds += features[i] * constants.factors[i];
  if (merges_depthwise(p) && !p.prepared) plan.gpu_seconds += kFactorProduct;
  plan.predicted_seconds = std::max(plan.gpu_seconds, features[kKernels] * kLibraryCall);
  plan.features.assign(features.begin(), features.end());
  if (merges_depthwise(p))
    plan.notes.push_back("the depthwise stages are multiplied out into one " + std::to_string(p.kh) + "x" +
                         std::to_string(p.kw) + " convolution" + (p.prepared ? ", once before the calls" : ""));
  return plan;
}

}  // namespace lowrank_ops
