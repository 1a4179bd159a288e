#include "plan/gpu/search.h"

#include <algorithm>
#include <climits>
#include <vector>

#include "plan/counts.h"
#include "plan/gpu/cost.h"
#include "plan/gpu/sm90a.h"

namespace lowrank_ops {
namespace {

// The tile sizes of an axis worth trying: the whole axis, equal shares of it, near-powers of two that divide it evenly,
// and all of these rounded up to `multiple`. Where the axis is itself a multiple, only multiples.
std::vector<int> tile_sizes(int outputs, int limit, int multiple) {
  std::vector<int> sizes;
  const auto add = [&](int64_t size) {
    if (size >= 1 && size <= limit && (outputs % multiple != 0 || size % multiple == 0)) sizes.push_back(int(size));
  };
  constexpr int kShares = 8;
  for (int share = 1; share <= kShares; ++share) {
    add(ceil_div(outputs, share));
    add(round_up(ceil_div(outputs, share), multiple));
  }
  for (int size = 1; size <= limit && size < 2 * outputs; size *= 2) {
    const int64_t even = ceil_div(outputs, ceil_div(outputs, size));
    add(size < multiple ? even : round_up(even, multiple));
  }
  std::sort(sizes.begin(), sizes.end());
  sizes.erase(std::unique(sizes.begin(), sizes.end()), sizes.end());
  return sizes;
}

// The sizes of equal parts of `count` items: parts of at most `largest`, of half as many, and so on down to one.
std::vector<int> halves(int64_t count, int64_t largest) {
  std::vector<int> parts;
  for (int64_t part = std::min(count, largest); part >= 1; part /= 2) {
    const int even = int(ceil_div(count, ceil_div(count, part)));
    if (parts.empty() || parts.back() != even) parts.push_back(even);
  }
  return parts;
}

// Cuts whose predicted times differ by less than this factor count as equally fast. The one with the fewest operations
// (padding, halo and repeated stages included) is then taken: it leaves most of the GPU to other work.
constexpr double kEquallyFast = 1.02;

struct Cut {
  Geometry geometry;
  double seconds, flops;
};
const Cut* best_of(const std::vector<Cut>& cuts) {
  const Cut* fastest = nullptr;
  for (const Cut& cut : cuts)
    if (!fastest || cut.seconds < fastest->seconds) fastest = &cut;
  const Cut* best = fastest;
  for (const Cut& cut : cuts)
    if (cut.seconds <= fastest->seconds * kEquallyFast &&
        (cut.flops < best->flops || (cut.flops == best->flops && cut.seconds < best->seconds)))
      best = &cut;
  return best;
}

// A lower bound of the shared memory that a cut needs: the hidden tiles and the factors that are kept alone, computed
// in doubles, which do not overflow. Where the bound fits into shared memory, shared_layout can compute in 32 bits.
double tiles_and_factors_bytes(const Problem& p, const Config& config, const Geometry& g) {
  const auto row = [&](int64_t rank) { return double(rank * element_bytes(p.dtype) + kVectorBytes); };
  const auto halo = [](const TileAxis& axis) { return double(axis.tile - 1) * axis.stride + axis.kernel; };
  const double first = double(g.tile_n) * halo(g.rows) * halo(g.columns) * row(p.r1);
  const double hidden = p.op == Op::kTucker ? std::max(first, config.pixels() * row(p.r2)) : first;
  if (!config.persistent) return hidden;
  const double factors = double(p.s) * p.r1 + double(p.kh) * p.kw * p.r1 * p.r2 + double(p.t) * p.r2;
  return hidden + element_bytes(p.dtype) * factors;
}

class Search {
 public:
  Search(const Problem& p, const GpuKernel& kernel, const GpuCaps& caps)
      : p_(p), kernel_(kernel), caps_(caps), whole_(geometry_of(p, 1, 1, 1, 2, 1)) {}

  FoundCut run() {
    // ldmatrix reads eight neighbouring pixels at a time, without bank conflicts where all eight lie in one line.
    constexpr int kLineMultiple = 8;
    try_tiles(kLineMultiple);
    if (cuts_.empty()) try_tiles(1);
    FoundCut found;
    found.geometry.stages = 0;
    if (const Cut* best = best_of(cuts_)) found.geometry = best->geometry;
    found.too_many_ctas = too_many_ctas_;
    found.least_shared_bytes = int64_t(std::min(least_bytes_, double(INT64_MAX / 2)));
    return found;
  }

 private:
  void try_tiles(int line_multiple) {
    const int pixels = kernel_.shape.pixels(), lines = whole_.rows.class_outputs(),
              line = whole_.columns.class_outputs();
    for (const int tile_w : tile_sizes(line, pixels, line_multiple))
      for (const int tile_h : tile_sizes(lines, pixels / tile_w, 1)) {
        const bool whole_image = tile_w >= line && tile_h >= lines;
        for (const int tile_n : halves(whole_.n, whole_image ? pixels / (tile_w * tile_h) : 1))
          try_tile(geometry_of(p_, tile_n, tile_h, tile_w, 2, 1));
      }
  }

  void try_tile(Geometry g) {
    const double bytes = tiles_and_factors_bytes(p_, kernel_.shape, g);
    if (bytes > double(caps_.shared_bytes_cta)) {
      least_bytes_ = std::min(least_bytes_, bytes);
      return;
    }
    // In doubles: the product may exceed 64 bits. A persistent CTA's tile counter runs beyond the last tile by the
    // CTAs that the GPU holds.
    const double beyond = kernel_.shape.persistent ? double(kLargestCtas) * caps_.multiprocessors : 0;
    if (double(ceil_div(g.n, g.tile_n)) * g.rows.tiles() * g.columns.tiles() + beyond > INT_MAX) {
      too_many_ctas_ = true;
      return;
    }
    const int64_t out_passes = ceil_div(p_.t, kernel_.shape.columns());
    Plan plan;
    for (; g.stages <= kMaxStages; ++g.stages) {
      const SharedLayout layout = layout_of(p_, kernel_, g);
      least_bytes_ = std::min(least_bytes_, double(layout.bytes));
      if (layout.bytes > caps_.shared_bytes_cta) return;
      for (const int share : halves(out_passes, out_passes)) {
        if (kernel_.shape.persistent && share < out_passes) break;  // it has no splits
        g.splits = int(ceil_div(out_passes, share));
        if (g.ctas() > INT_MAX) break;  // more splits only make more CTAs
        plan.geometry = g;
        cost_fused(plan, p_, kernel_, caps_, layout);
        cuts_.push_back({g, plan.predicted_seconds, plan.flops});
      }
      g.splits = 1;
    }
  }

  const Problem& p_;
  const GpuKernel& kernel_;
  const GpuCaps& caps_;
  const Geometry whole_;
  std::vector<Cut> cuts_;
  double least_bytes_ = double(INT64_MAX);
  bool too_many_ctas_ = false;
};

// The cut of an sm90a kernel with the clusters, and in the linear kernel the splits, of the lowest predicted time.
Geometry best_sharing(const Problem& problem, const GpuKernel& kernel, const GpuCaps& caps, Geometry g) {
  const int64_t chunks = problem.op == Op::kLinear ? linear_sm90a_layout(g).chunks : 1;
  const SharedLayout layout = layout_of(problem, kernel, g);
  std::vector<Cut> cuts;
  Plan plan;
  for (g.cluster = 1; g.cluster <= sm90a_most_cluster(kernel, g.tiles(), caps); ++g.cluster)
    for (const int share : halves(chunks, chunks)) {
      g.splits = int(ceil_div(chunks, share));
      if (g.ctas() + 2 * caps.multiprocessors > INT_MAX) break;  // more splits only make more items
      plan.geometry = g;
      cost_fused(plan, problem, kernel, caps, layout);
      cuts.push_back({g, plan.predicted_seconds, plan.flops});
    }
  return best_of(cuts)->geometry;
}

// The cut of an sm90a kernel, which has no choice of tiles.
FoundCut only_cut(const Problem& problem, const GpuKernel& kernel, const GpuCaps& caps) {
  FoundCut found;
  found.geometry = sm90a_cut(problem, kernel);
  found.least_shared_bytes = sm90a_bytes(kernel, found.geometry);
  // In doubles: the product may exceed 64 bits. A CTA's tile counter runs to two grids beyond the last tile.
  const Geometry& g = found.geometry;
  const double tiles = double(g.n) * g.rows.tiles() * g.columns.tiles() + 2 * caps.multiprocessors;
  found.too_many_ctas = tiles > INT_MAX;
  if (found.too_many_ctas || found.least_shared_bytes > caps.shared_bytes_cta) found.geometry.stages = 0;
  if (found.geometry.stages > 0) found.geometry = best_sharing(problem, kernel, caps, found.geometry);
  return found;
}

}  // namespace

FoundCut search_cut(const Problem& problem, const GpuKernel& kernel, const GpuCaps& caps) {
  if (is_sm90a(kernel)) return only_cut(problem, kernel, caps);
  return Search(problem, kernel, caps).run();
}

}  // namespace lowrank_ops
