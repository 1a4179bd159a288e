#include "plan/gpu/planner.h"

#include <algorithm>
#include <climits>
#include <cstdio>
#include <numeric>

#include "plan/counts.h"
#include "plan/gpu/cost.h"
#include "plan/gpu/reasons.h"
#include "plan/gpu/search.h"
#include "plan/gpu/sm90a.h"

namespace lowrank_ops {
namespace {

// The names that the lines of kernel_table.inc expand to.
constexpr Op kOp_tucker = Op::kTucker, kOp_cp = Op::kCP, kOp_linear = Op::kLinear;
#define LOWRANK_OPS_NAME_tucker "tucker_conv2d"
#define LOWRANK_OPS_NAME_cp "cp_conv2d"
#define LOWRANK_OPS_NAME_linear "lowrank_linear"
constexpr Family kFamily_sm90a = Family::kSm90a, kFamily_sm80 = Family::kSm80, kFamily_simt = Family::kSimt;
constexpr int kFirst_sm90a = 90;  // and no other architecture: wgmma, setmaxnreg
constexpr int kFirst_sm80 = 80;   // mma.sync with bf16 and tf32, cp.async
constexpr int kFirst_simt = 75;   // the oldest that nvcc 13 compiles for

std::string kib(int64_t bytes) {
  return std::to_string((bytes + 1023) / 1024) + " KiB";
}

std::string margin_text() {
  char digits[16];
  std::snprintf(digits, sizeof digits, "%.1f", kUnmeasuredMargin);
  return digits;
}

TileAxis axis_of(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  // One tap needs only every stride-th position, so those are the units.
  const int64_t unit = kernel == 1 ? stride : dilation, common = std::gcd(stride, unit);
  TileAxis axis;
  axis.in = int(in);
  axis.out = int(out);
  axis.kernel = int(kernel);
  axis.padding = int(padding);
  axis.lattice = int(unit / common);
  axis.unit = int(unit);
  axis.stride = int(stride / common);
  axis.original_stride = int(stride);
  return axis;
}

}  // namespace

const std::vector<GpuKernel>& gpu_kernels() {
#define GPU_KERNEL(op, family, config, shape, verified_on, measured_on) \
  {LOWRANK_OPS_NAME_##op "_" #family "_" #shape,                        \
   kOp_##op,                                                            \
   kFamily_##family,                                                    \
   config,                                                              \
   config_of(kFamily_##family, config, kOp_##op != Op::kLinear),        \
   kFirst_##family,                                                     \
   verified_on,                                                         \
   measured_on},
  static const std::vector<GpuKernel> kernels = {
#include "plan/gpu/kernel_table.inc"
  };
#undef GPU_KERNEL
  return kernels;
}

namespace {

// Whether one of these GPUs, whose names are separated by ", ", has the architecture of `caps`.
bool have_architecture_of(const GpuCaps& caps, const std::string& names) {
  for (size_t first = 0; first < names.size();) {
    const size_t end = std::min(names.find(", ", first), names.size());
    const GpuCaps* gpu = find_gpu(names.substr(first, end - first));
    if (gpu && gpu->architecture == caps.architecture) return true;
    first = end + 2;
  }
  return false;
}

}  // namespace

bool ran_right_on(const GpuKernel& kernel, const GpuCaps& caps) {
  return have_architecture_of(caps, kernel.verified_on);
}

bool is_measured(const GpuCaps& caps) {
  return caps.architecture == kMeasuredArchitecture;
}

bool is_measured(const GpuKernel& kernel, const Problem& p, const GpuCaps& caps) {
  // sm90a's strided and dilated windows came after the measurements.
  const bool plain = p.stride[0] == 1 && p.stride[1] == 1 && p.dilation[0] == 1 && p.dilation[1] == 1;
  return have_architecture_of(caps, kernel.measured_on) && (plain || !is_sm90a(kernel));
}

int gpu_kernel_index(const std::string& kernel_name) {
  const std::vector<GpuKernel>& kernels = gpu_kernels();
  for (size_t i = 0; i < kernels.size(); ++i)
    if (kernel_name == kernels[i].name) return int(i);
  return -1;
}

Geometry geometry_of(const Problem& p, int tile_n, int tile_h, int tile_w, int stages, int splits, int cluster) {
  Geometry g;
  if (p.op == Op::kLinear) {  // one image of one line; the layer's rows are its pixels
    g.n = 1;
    g.columns.in = g.columns.out = int(p.n);
  } else {
    g.n = int(p.n);
    g.rows = axis_of(p.h, p.oh, p.kh, p.stride[0], p.padding[0], p.dilation[0]);
    g.columns = axis_of(p.w, p.ow, p.kw, p.stride[1], p.padding[1], p.dilation[1]);
  }
  g.tile_n = tile_n;
  g.rows.tile = tile_h;
  g.columns.tile = tile_w;
  g.s = int(p.s);
  g.t = int(p.t);
  g.r1 = int(p.r1);
  g.r2 = int(p.r2);
  g.stages = stages;
  g.splits = splits;
  g.cluster = cluster;
  return g;
}

const char* name_of(Family family) {
  return family == Family::kSimt ? "simt" : family == Family::kSm80 ? "sm80" : "sm90a";
}

bool is_simt(const GpuKernel& kernel) {
  return kernel.family == Family::kSimt;
}

int threads_of(const GpuKernel& kernel) {
  return is_sm90a(kernel) ? sm90a_threads(kernel) : kernel.shape.threads();
}

bool is_lean(const Problem& p, const GpuKernel& kernel) {
  const CopyWidths widths = copy_widths(p);
  return !is_simt(kernel) && !is_sm90a(kernel) &&
         std::min({widths.input, widths.factor, widths.output}) == kVectorBytes;
}

SharedLayout layout_of(const Problem& p, const GpuKernel& kernel, const Geometry& geometry) {
  if (is_sm90a(kernel)) {  // their own headers have the offsets (<op>_sm90a.h)
    SharedLayout layout;
    layout.bytes = sm90a_bytes(kernel, geometry);
    return layout;
  }
  return shared_layout(geometry, kernel.shape, int(element_bytes(p.dtype)), p.op == Op::kTucker, is_lean(p, kernel));
}

Problem kernel_problem(Problem p) {
  if (!p.prepared) return p;
  p.r1 = padded_rank(p.r1, element_bytes(p.dtype));
  p.r2 = padded_rank(p.r2, element_bytes(p.dtype));
  return p;
}

CopyWidths copy_widths(const Problem& p) {
  const int64_t element = element_bytes(p.dtype);
  const auto dividing = [&](int64_t channels) {
    for (const int64_t width : {16, 8, 4})
      if (width > element && channels * element % width == 0) return width;
    return element;
  };
  const bool by_pixel = p.op == Op::kLinear || p.layout == Layout::kChannelsLast;
  CopyWidths widths{p.input_vector, p.factor_vector, p.output_vector};
  if (widths.input == 0) widths.input = by_pixel || p.h * p.w == 1 ? dividing(p.s) : element;
  if (widths.factor == 0) widths.factor = std::min({dividing(p.s), dividing(p.r1), dividing(p.r2)});
  if (widths.output == 0) widths.output = by_pixel || p.oh * p.ow == 1 ? dividing(p.t) : element;
  if (widths.output < kVectorBytes) widths.output = element;  // kernels write either 16-byte vectors or single elements
  return widths;
}

namespace {

std::vector<std::string> notes_of(const Problem& p, const GpuKernel& kernel, const GpuCaps& caps, const Plan& plan,
                                  const SharedLayout& l) {
  std::vector<std::string> notes;
  if (p.prepared)
    notes.push_back(
        "reads the factors that prepare_for_inference_ has copied, ranks padded to whole vectors of 16 bytes; where "
        "they "
        "have changed since, the ordinary ones by their own plan");
  const Geometry& g = plan.geometry;
  const CopyWidths widths = copy_widths(p);
  const int64_t element = element_bytes(p.dtype);
  if (g.tile_n > 1) notes.push_back(std::to_string(g.tile_n) + " images per tile");
  if (kernel.shape.persistent) notes.push_back("CTAs keep all factors in shared memory and take tile after tile");
  if (g.splits > 1) notes.push_back("T split over " + std::to_string(g.splits) + " CTAs, earlier stages in each");
  if (g.cluster > 1)
    notes.push_back("clusters of " + std::to_string(g.cluster) + " CTAs copy the factors for each other");
  if (g.rows.lattice > 1 || g.columns.lattice > 1)
    notes.push_back("tiles on the dilation's lattice " + std::to_string(g.rows.lattice) + "x" +
                    std::to_string(g.columns.lattice));
  const auto narrow = [&](const char* what, int64_t width, bool by_pixel) {
    if (width == kVectorBytes) return;
    if (width > element)
      notes.push_back(std::string(what) + ": no multiples of 16 bytes, copies of " + std::to_string(width));
    else
      notes.push_back(std::string(what) +
                      (by_pixel ? ": copied element by element" : " in NCHW: copied element by element"));
  };
  const bool by_pixel = p.op == Op::kLinear || p.layout == Layout::kChannelsLast;
  narrow("input", widths.input, by_pixel);
  narrow("factors", widths.factor, true);
  narrow("output", widths.output, by_pixel);
  if (l.r1_passes > 1)
    notes.push_back("input read " + std::to_string(l.r1_passes) + " times: R1 above the " +
                    std::to_string(kernel.shape.columns()) + " columns of a pass");
  if (l.halo_passes > 1 && !kernel.shape.persistent)
    notes.push_back("in_factor read " + std::to_string(l.halo_passes) + " times per tile: its halo is above " +
                    std::to_string(kernel.shape.halo_rows()) + " pixels");
  if (is_measured(caps) && !is_measured(kernel, p, caps))
    notes.push_back("its time is predicted by counts and was measured on no GPU: " + margin_text() +
                    " times as long is assumed");
  if (!ran_right_on(kernel, caps))
    notes.push_back("its tests have not all run on this kind of GPU: checked before first use");
  return notes;
}

}  // namespace

GpuCandidate plan_kernel(const Problem& p, const GpuKernel& kernel, const GpuCaps& caps) {
  GpuCandidate candidate;
  std::string& reason = candidate.reason;
  reason = is_sm90a(kernel) ? sm90a_reason(p, kernel) : dtype_reason(p, kernel);
  if (reason.empty()) reason = persistent_reason(p, kernel);
  if (reason.empty()) reason = architecture_reason(kernel, caps);
  if (reason.empty()) {
    reason = code_reason(kernel, caps);
    candidate.no_code = !reason.empty();
  }
  if (reason.empty()) reason = size_reason(p);
  if (!reason.empty()) return candidate;
  const FoundCut found = search_cut(p, kernel, caps);
  if (found.geometry.stages == 0) {
    reason = found.too_many_ctas ? "needs more than " + std::to_string(INT_MAX) + " CTAs"
                                 : "needs " + kib(found.least_shared_bytes) +
                                       " of shared memory, this GPU gives a CTA " + kib(caps.shared_bytes_cta);
    return candidate;
  }
  Plan& plan = candidate.plan;
  plan.path = Path::kFused;
  plan.kernel = kernel.name;
  plan.gpu_kernel = gpu_kernel_index(kernel.name);
  plan.geometry = found.geometry;
  const SharedLayout layout = layout_of(p, kernel, plan.geometry);
  cost_fused(plan, p, kernel, caps, layout);
  const FusedFeatures features = fused_features(p, kernel, plan.geometry, layout, caps);
  plan.features.assign(features.begin(), features.end());
  plan.notes = notes_of(p, kernel, caps, plan, layout);
  return candidate;
}

namespace {

// The time that "auto" assumes for a fused kernel.
double assumed_seconds(const Plan& plan, const Problem& p, const GpuCaps& caps, double seconds) {
  return is_measured(gpu_kernels()[size_t(plan.gpu_kernel)], p, caps) ? seconds : kUnmeasuredMargin * seconds;
}

// Why "auto" does not take `plan`.
std::string why_not(const Plan& plan, const Plan& chosen) {
  if (plan.predicted_seconds >= chosen.predicted_seconds) return "predicted to be slower";
  return "predicted less than " + margin_text() +
         " times as fast as the choice; its time has not been measured on this architecture";
}

}  // namespace

Decision plan_gpu(const Problem& p, const GpuCaps& caps, Policy policy, const GpuRestrictions& restrictions) {
  const std::vector<GpuKernel>& kernels = gpu_kernels();
  const bool forced = restrictions.only >= 0 && kernels[size_t(restrictions.only)].op == p.op;
  Decision decision;
  std::vector<Plan> fused;
  for (size_t i = 0; i < kernels.size(); ++i) {
    if (kernels[i].op != p.op) continue;
    if (forced && int(i) != restrictions.only) {
      decision.rejections.push_back({kernels[i].name, std::string("only ") + kernels[size_t(restrictions.only)].name +
                                                          " is allowed (force_gpu_kernel)"});
      continue;
    }
    const bool refused = i < restrictions.refused.size() && !restrictions.refused[i].empty();
    GpuCandidate candidate = plan_kernel(kernel_problem(p), kernels[i], caps);
    if (candidate.reason.empty() && refused) candidate.reason = restrictions.refused[i];
    if (candidate.reason.empty())
      fused.push_back(std::move(candidate.plan));
    else
      decision.rejections.push_back({kernels[i].name, candidate.reason, candidate.no_code});
  }
  const auto faster = [](const Plan& a, const Plan& b) { return a.predicted_seconds < b.predicted_seconds; };
  std::stable_sort(fused.begin(), fused.end(), faster);
  const auto assumed = [&](const Plan& plan) { return assumed_seconds(plan, p, caps, plan.predicted_seconds); };
  const auto best = std::min_element(fused.begin(), fused.end(),
                                     [&](const Plan& a, const Plan& b) { return assumed(a) < assumed(b); });

  const Plan chain = chain_plan(p, caps);
  const bool want_fused = forced || policy == Policy::kFused;
  const bool take_chain = fused.empty() || (!forced && policy == Policy::kChain) ||
                          (!want_fused && chain.predicted_seconds < assumed(*best));
  decision.chosen = take_chain ? chain : *best;
  if (!take_chain && !want_fused && chain.gpu_seconds < assumed_seconds(*best, p, caps, best->gpu_seconds)) {
    decision.chain_in_graphs = true;
    decision.chosen.notes.push_back("in a CUDA graph, whose launches cost no CPU time, the chain runs");
  }
  if (!take_chain) fused.erase(best);
  decision.others = std::move(fused);
  if (!take_chain)
    decision.others.insert(std::upper_bound(decision.others.begin(), decision.others.end(), chain, faster), chain);
  for (const Plan& plan : decision.others) {
    const bool told = policy == Policy::kChain || (policy == Policy::kFused && plan.path == Path::kChain);
    decision.rejections.push_back({plan.kernel, forced ? std::string("a kernel is forced (force_gpu_kernel)")
                                                : told ? by_policy(policy)
                                                       : why_not(plan, decision.chosen)});
  }
  return decision;
}

}  // namespace lowrank_ops
