#include "plan/cpu/planner.h"

#include <algorithm>
#include <array>
#include <numeric>
#include <optional>

#include "plan/cpu/cost.h"
#include "plan/cpu/sharing.h"

namespace lowrank_ops {

namespace {

constexpr int64_t kPixelsPerStep = 56;  // enough rows of A to pay for streaming a weight panel out of L2
constexpr int64_t kLinearRows = 112;
// Images beyond L2 are read and written in longer steps, which is at most a fifth faster (Zen 5): a linear layer's
// rows, as long as their hidden values fit an eighth of L2, and the pixels of convolutions whose first stage prefetches
// its own input.
constexpr int64_t kMostLinearRows = 512;
constexpr int64_t kFarPixelsPerStep = 500;
constexpr int64_t kPlanePixelsPerStep = 4096;  // where the last stage spreads a plane: long runs per output channel
constexpr int64_t kFewRows = 8;                // at most so many rows (CP: pixels) read the weights unpacked
constexpr int64_t kStreamedRows = 512;         // at most so many rows stream through blocks of the weights
constexpr int64_t kStreamedBytes = 2048;       // the most bytes of a row that meet such a block
constexpr int64_t kFewestColumns = 28;         // of a tile that is narrower than the image
// Winograd: patches are the rows of its GEMMs, which must be worth their calls. With 36 places of more than one vector
// it matters more that the patches stay in L2.
constexpr int64_t kPatchesPerStep = 28;
constexpr int64_t kDeepPatchesPerStep = 8;
constexpr int64_t kFewestSummed = 8;         // channels of a pixel, for a dot product to fill vectors
constexpr int64_t kFewestRanks = 8;          // Winograd 4x4 and lines: shorter sums do not average their errors enough
constexpr int64_t kMostNearBytes = 8 << 20;  // of input, output and weights: larger blocks are prefetched
constexpr double kMostPlacesBytes = 3;       // Winograd 4x4: its weight per byte of L2; larger ones are read too slowly

// The cost of an image's core stage, in multiply-adds. Winograd saves 5 of 9 products per output (2x2), 3 of 4 (4x4) or
// 4 of 9 (lines); it has to transform hidden values and sums, and to transform, pack and read a larger weight.
double core_cost(const Problem& p, bool prepared, Winograd winograd) {
  const double values = double(p.r1) * p.r2;
  if (winograd == Winograd::kNone) return double(p.oh) * p.ow * p.kh * p.kw * values;
  const Patch patch = patch_of(winograd);
  const double products = double(patch.places) * tap_groups(winograd, p.kw) * values;
  const double patches = double(ceil_div(p.oh, patch.rows)) * ceil_div(p.ow, patch.columns);
  // transform: cost of the transforms per value and output. weight: extra cost per weight value over the direct core,
  // for transforming and packing it, or for reading it if it is prepared. In fp32, 6 were measured at one thread (512
  // channels, 7x7) and at most 40 at two that share a panel: 9 is between. The cost must not depend on the number of
  // threads, because the bits of a result must not.
  // In bf16 the direct core is as fast for ranks of 16, and at most 1.14 times as fast on images beyond L2 (Zen 5).
  const double transform = p.dtype == DType::kFloat ? 16 : winograd == Winograd::kLine ? 32 : 44;
  const double weight = prepared ? 10 : p.dtype == DType::kFloat ? 9 : 14;
  // The other threads of a small call wait while the larger weight is packed.
  const double call = prepared ? 0 : 3e5;
  return patches * (products + double(patch.rows * patch.columns) * transform * double(p.r1 + p.r2)) +
         (weight * products + call) / double(std::max<int64_t>(p.n, 1));
}

// The ways to run the core, in order of their predicted speed; the direct core, which is always possible, comes last.
std::array<Winograd, 3> core_ways(const Problem& p, const CpuCaps& caps, bool prepared) {
  std::array<Winograd, 3> ways{};  // at most two kinds of patches are possible for a window
  if (p.op != Op::kTucker) return ways;
  int count = 0;
  for (const Winograd winograd : kPatches)
    if (winograd_fits(p, caps, winograd) &&
        (caps.winograd_auto ? core_cost(p, prepared, winograd) < core_cost(p, prepared, Winograd::kNone)
                            : caps.winograd == winograd))
      ways[count++] = winograd;
  if (count == 2 && core_cost(p, prepared, ways[1]) < core_cost(p, prepared, ways[0])) std::swap(ways[0], ways[1]);
  return ways;
}

// Whether weights are read unpacked, for `rows` rows. Prepared panels are read in one stream, which is 1.2 to 1.5 times
// as fast where rows and vectors of the rank make enough sums to hide the latency of an addition.
bool reads_unpacked(const Problem& p, int64_t rows, bool prepared) {
  return rows <= kFewRows && !(prepared && rows * ceil_div(p.r1, kAlign) >= 4);
}

// Whether input and output are to be prefetched. Up to some MB in L3, hardware prefetching does as well, and prefetches
// only cost time (Zen 5: at most 12 % of a call, 25 % with sums over 32 channels). Beyond that, calls without
// prefetches lose at most half (with sums over 8 channels two thirds).
bool is_far(const Problem& p, const CpuCaps& caps) {
  return block_bytes(p) > double(std::max(caps.l2_bytes / 4 * 5, std::min(caps.l3_bytes / 4, kMostNearBytes)));
}

CpuTile linear_tile(const Problem& p, const CpuCaps& caps, bool prepared) {
  const auto [converted, element, sum, r1, r2] = TileSizes(p, caps);
  CpuTile tile;
  tile.prepared = prepared;
  if (reads_unpacked(p, p.n, prepared)) {
    tile.unpacked = true;
    tile.rows = p.n;
    tile.scratch_bytes = p.n * ((r1 + p.s) * element + (r1 + p.t) * sum);
    return tile;
  }
  if (p.n <= kStreamedRows && (p.s + p.t) * p.r1 * element > caps.l2_bytes / 8) {
    tile.rows = p.n;
    const int64_t fitting = caps.l2_bytes / 4 / (p.n * element);
    tile.depth = std::clamp<int64_t>(fitting / 64 * 64, 64, kStreamedBytes / element);
    const int64_t summed = std::max<int64_t>(p.s > tile.depth ? r1 : 0, p.r1 > tile.depth ? 64 : 0);
    tile.scratch_bytes =
        (p.n * (streamed_stride(tile.depth) + streamed_stride(p.r1)) + tile.depth * 64) * element + p.n * summed * sum;
    return tile;
  }
  const int64_t share = ceil_div(p.n, std::max<int64_t>(caps.threads, 1));
  tile.far = is_far(p, caps);
  const int64_t fitting = tile.far ? caps.l2_bytes / 8 / (r1 * element) : 0;
  tile.rows = ceil_div(share, ceil_div(share, std::clamp(fitting, kLinearRows, kMostLinearRows)));
  tile.scratch_bytes = (tile.rows * r1 + std::min(tile.rows, kLinearRows) * p.s) * element;
  return tile;
}

// CP of few pixels in all: one tile holds all of them.
CpuTile few_pixels_tile(const Problem& p, const CpuCaps& caps, bool prepared) {
  const TileSizes sizes(p, caps);
  CpuTile tile;
  tile.prepared = prepared;
  tile.unpacked = true;
  tile.rows = p.oh;
  tile.columns = p.ow;
  tile.scratch_bytes =
      p.n * (p.h * p.w * (p.s * sizes.element + sizes.r1 * sizes.sum) + p.oh * p.ow * (sizes.r2 + p.t) * sizes.sum);
  return tile;
}

// Half of L2 for the tiles; weights and the input stream through the other half. Lines get more, for fewer and wider
// tiles: neighbouring tiles both compute the hidden values that their taps share.
int64_t most_scratch(const CpuCaps& caps, Winograd winograd) {
  return winograd == Winograd::kLine ? caps.l2_bytes / 4 * 3 : caps.l2_bytes / 2;
}

// The tile of a convolution; nothing where ranks are too large for all of Winograd's places even in the narrowest tile.
// That is decided before the tile is divided among threads: bits must not depend on their number.
std::optional<CpuTile> conv_tile(const Problem& p, const CpuCaps& caps, bool prepared, Winograd winograd) {
  const auto [converted, element, sum, r1, r2] = TileSizes(p, caps);
  CpuTile tile;
  tile.prepared = prepared;
  const Axis rows = row_axis(p);
  tile.far = is_far(p, caps);
  tile.winograd = winograd;
  const bool transforms = winograd != Winograd::kNone;
  const Patch patch = patch_of(winograd);
  const ConvScratch scratch(p, caps, winograd);
  if (transforms) {
    const int64_t patches = winograd == Winograd::k4x4 && r1 > kAlign ? kDeepPatchesPerStep : kPatchesPerStep;
    tile.rows = patch.rows *
                std::clamp<int64_t>(ceil_div(patches, ceil_div(p.ow, patch.columns)), 1, ceil_div(p.oh, patch.rows));
  } else {
    const int64_t pixels = tile.far && first_stage(p) == FirstStage::kDots ? kFarPixelsPerStep : kPixelsPerStep;
    const auto rows_of = [&](int64_t step) { return std::clamp<int64_t>(ceil_div(step, p.ow), 1, p.oh); };
    int64_t step = spreads_plane(p, winograd, in_pairs(p, caps)) ? kPlanePixelsPerStep : pixels;
    while (step > pixels && scratch(rows_of(step), p.ow) > caps.l2_bytes / 4) step /= 2;
    tile.rows = rows_of(std::max(step, pixels));
  }
  tile.columns = p.ow;
  // The input and output of a step have to stay in L2, beside its tile, from their prefetch to their use.
  const auto footprint = [&](int64_t tile_rows) {
    const int64_t touched = tile_rows * tile.columns * (p.s + p.t) * element;
    return scratch(tile_rows, tile.columns) + (tile.far ? touched : 0);
  };
  const auto fits = [&](int64_t tile_rows) { return footprint(tile_rows) <= caps.l2_bytes / 4 * 3; };
  // Winograd's many places leave less room.
  const auto too_large = [&] {
    return scratch(tile.rows, tile.columns) > most_scratch(caps, winograd) ||
           (winograd == Winograd::k4x4 && footprint(tile.rows) > caps.l2_bytes / 5 * 3);
  };
  while (transforms && too_large() && tile.rows > patch.rows)
    tile.rows = round_up(tile.rows / 2, patch.rows);  // large ranks: fewer patches per pass over the weights
  if (too_large() && tile.columns > kFewestColumns) {
    // Bisection finds the fewest parts whose tiles fit, or are narrow: narrower tiles never take more memory.
    int64_t too_few = 1, parts = p.ow;
    const auto take = [&](int64_t count) { tile.columns = round_up(ceil_div(p.ow, count), patch.columns); };
    while (parts - too_few > 1) {
      const int64_t middle = too_few + (parts - too_few) / 2;
      take(middle);
      (too_large() && tile.columns > kFewestColumns ? too_few : parts) = middle;
    }
    take(parts);
  }
  // CP's kernel for stride 1 reads a hidden row once for two output rows.
  const bool shares_rows = p.op == Op::kCP && rows.stride == 1 && rows.dilation == 1 && tile.rows == 1 && p.oh > 1;
  if (shares_rows && scratch(2, tile.columns) <= caps.l2_bytes / 2 && fits(2)) tile.rows = 2;
  // A first stage of sums over channels prefetches only its own input: output prefetches would be late.
  tile.spreads_prefetches = tile.far && fits(tile.rows) && first_stage(p) == FirstStage::kPanels;
  tile.scratch_bytes = scratch(tile.rows, tile.columns);
  if (transforms && caps.winograd_auto && tile.scratch_bytes > most_scratch(caps, winograd)) return std::nullopt;
  if (caps.threads > 1) share_out(p, caps, scratch, tile);
  return tile;
}

}  // namespace

FirstStage first_stage(const Problem& p) {
  if (p.r1 != 1) return FirstStage::kPanels;
  const bool planes = p.op != Op::kLinear && (p.layout == Layout::kContiguous || p.s == 1);
  if (planes && column_axis(p).step == 1) return FirstStage::kPlanes;
  return p.s >= kFewestSummed ? FirstStage::kDots : FirstStage::kPanels;
}

bool spreads_plane(const Problem& p, Winograd winograd, bool pairs) {
  return p.op != Op::kLinear && winograd == Winograd::kNone && p.r2 == 1 && !pairs &&
         (p.layout == Layout::kContiguous || p.t == 1);
}

CoreStage core_stage(const Problem& p, Winograd winograd, bool pairs) {
  if (p.op != Op::kTucker || winograd != Winograd::kNone || p.r2 != 1) return CoreStage::kPanels;
  if (p.r1 == 1 && !pairs) return CoreStage::kPlanes;
  const int64_t run = column_axis(p).dilation == 1 ? p.kw * p.r1 : p.r1;
  return run >= kFewestSummed ? CoreStage::kDots : CoreStage::kPanels;
}

bool winograd_fits(const Problem& p, const CpuCaps& caps, Winograd winograd) {
  // The transforms round to the weight's own type, and exist where elements are of that type.
  const bool own_type = p.dtype == DType::kFloat || (p.dtype == DType::kBFloat16 && caps.bfloat16_dot && !caps.amx);
  const bool unit_columns = p.stride[1] == 1 && p.dilation[1] == 1;
  const bool square = unit_columns && p.stride[0] == 1 && p.dilation[0] == 1 && p.kh == 3 && p.kw == 3;
  const bool long_sums = std::min(p.r1, p.r2) >= kFewestRanks;
  switch (winograd) {
    case Winograd::k2x2:
      return own_type && square;
    case Winograd::k4x4:
      return p.dtype == DType::kFloat && square && long_sums &&
             double(36 * p.r1 * p.r2 * 4) <= kMostPlacesBytes * double(caps.l2_bytes);
    case Winograd::kLine:
      return own_type && unit_columns && p.kh == 1 && p.kw >= 3 && long_sums;
    case Winograd::kNone:
      break;
  }
  return false;
}

CpuTile cpu_tile(const Problem& p, const CpuCaps& caps, bool prepared) {
  if (p.op == Op::kLinear) return linear_tile(p, caps, prepared);
  if (p.op == Op::kCP && reads_unpacked(p, p.n * std::max(p.h * p.w, p.oh * p.ow), prepared))
    return few_pixels_tile(p, caps, prepared);
  for (const Winograd winograd : core_ways(p, caps, prepared))
    if (const std::optional<CpuTile> tile = conv_tile(p, caps, prepared, winograd)) return *tile;
  return *conv_tile(p, caps, prepared, Winograd::kNone);
}

namespace {

std::string fused_kernel(const Problem& p, const CpuCaps& caps, const CpuTile& tile) {
  std::string kernel = std::string("cpu_") + name_of(p.op) + "_" + caps.isa;
  if (p.dtype == DType::kHalf || (p.dtype == DType::kBFloat16 && !caps.bfloat16_dot)) kernel += "_converted";
  if (tile.unpacked) kernel += "_unpacked";
  if (tile.depth > 0) kernel += "_streamed";
  if (tile.winograd != Winograd::kNone) kernel += std::string("_winograd_") + patch_of(tile.winograd).name;
  return kernel;
}

bool tile_is_too_large(const Problem& p, const CpuTile& tile) {
  return p.op != Op::kLinear && tile.scratch_bytes > kMostKeptBytes;
}

}  // namespace

CpuPlan make_cpu_plan(const Problem& p, const CpuCaps& caps, Policy policy, bool prepared) {
  CpuPlan plan;
  plan.tile = plan.one_thread_tile = cpu_tile(p, caps, prepared);
  if (caps.threads > 1) {
    CpuCaps one_thread = caps;
    one_thread.threads = 1;
    plan.one_thread_tile = cpu_tile(p, one_thread, prepared);
  }
  plan.fused_seconds = fused_seconds(p, caps, plan.one_thread_tile);
  plan.chain_seconds = chain_seconds(p, caps);
  const bool chain_is_faster = plan.chain_seconds > 0 && plan.chain_seconds < plan.fused_seconds;
  if (policy == Policy::kFused || policy == Policy::kChain) {
    plan.chain = policy == Policy::kChain;
  } else if (tile_is_too_large(p, plan.one_thread_tile)) {
    plan.chain = true;
    plan.other_possible = false;
  } else if (chain_needs_float32(p)) {
    plan.other_possible = false;
  } else {
    plan.chain = chain_is_faster;
  }
  return plan;
}

Decision plan_cpu(const Problem& p, const CpuCaps& caps, Policy policy, bool prepared) {
  const CpuPlan choice = make_cpu_plan(p, caps, policy, prepared);
  Decision decision;
  Plan fused, chain;
  fused.path = Path::kFused;
  fused.tile = choice.tile;
  fused.kernel = fused_kernel(p, caps, fused.tile);
  fused.flops = fused_flops(p, fused.tile);
  fused.bytes = block_bytes(p);
  if (fused.tile.prepared && !fused.tile.unpacked)
    fused.notes.push_back(
        "its weights were packed by prepare_for_inference_; packed anew in each call where they have changed since");
  if (p.column) fused.notes.push_back("images of one column are read as images of one row");
  fused.predicted_seconds = choice.fused_seconds;
  const Features fused_counts = fused_features(p, caps, choice.one_thread_tile), chain_counts = chain_features(p, caps);
  fused.features.assign(fused_counts.begin(), fused_counts.end());
  chain.features.assign(chain_counts.begin(), chain_counts.end());
  chain.path = Path::kChain;
  chain.kernel = "chain of torch ops";
  chain.flops = block_flops(p);
  chain.bytes = block_bytes(p) + hidden_bytes(p);
  chain.predicted_seconds = choice.chain_seconds;

  decision.chosen = choice.chain ? chain : fused;
  if (!choice.other_possible) {
    if (choice.chain)
      decision.rejections.push_back(
          {fused.kernel, "a tile would take " + std::to_string(choice.one_thread_tile.scratch_bytes >> 20) +
                             " MB: the window's taps lie far outside the image, or the ranks are very large"});
    else
      decision.rejections.push_back({chain.kernel,
                                     "torch's bf16 convolutions fail for some windows with a stride along the width; "
                                     "the chain would run in fp32"});
    return decision;
  }
  decision.others = {choice.chain ? fused : chain};
  const Plan& other = decision.others.front();
  std::string reason;
  if (policy == Policy::kFused || policy == Policy::kChain)
    reason = by_policy(policy);
  else if (chain.predicted_seconds == 0)
    reason = std::string("nothing was measured for ") + name_of(p.dtype) + ", where torch's own path is slow";
  else
    reason = "predicted to be slower";
  decision.rejections.push_back({other.kernel, reason});
  return decision;
}

}  // namespace lowrank_ops
