#include "plan/gpu_sm90a.h"

#include <algorithm>
#include <cstring>

namespace lowrank_ops {

using L = TuckerSm90a;

bool is_sm90a(const GpuKernel& kernel) {
  return std::strcmp(kernel.family, "sm90a") == 0;
}

std::string sm90a_reason(const Problem& p) {
  const auto pair = [](const int64_t (&values)[2]) {
    return std::to_string(values[0]) + "x" + std::to_string(values[1]);
  };
  if (p.dtype != DType::kBFloat16 && p.dtype != DType::kHalf) return "takes bfloat16 and float16";
  if (p.layout != Layout::kChannelsLast) return "takes channels_last, the input is in NCHW";
  const CopyWidths widths = copy_widths(p);
  if (std::min({widths.input, widths.factor, widths.output}) < kVectorBytes)
    return "channels, ranks and strides must be multiples of 16 bytes";
  if (p.repeats) return "the input or a factor repeats elements (a stride of 0), which the copy engine cannot";
  if (p.stride[0] != 1 || p.stride[1] != 1) return "stride must be 1, got " + pair(p.stride);
  const bool dilated = (p.kh > 1 && p.dilation[0] != 1) || (p.kw > 1 && p.dilation[1] != 1);
  if (dilated) return "dilation must be 1, got " + pair(p.dilation);
  if (std::max(p.r1, p.r2) > L::kMostRank)
    return "ranks must be at most " + std::to_string(L::kMostRank) + ", got " + std::to_string(std::max(p.r1, p.r2));
  constexpr int64_t kMostChannels = 65536;  // their slices' bytes fit into 32 bits
  if (std::max(p.s, p.t) > kMostChannels)
    return "channels must be at most " + std::to_string(kMostChannels) + ", got " + std::to_string(std::max(p.s, p.t));
  const int64_t height = L::kTileSide - 1 + p.kh, width = L::kTileSide - 1 + p.kw;
  if (height > L::kMostRows || width > L::kMostRows || height * width > L::kMostRows)
    return "a tile with its halo must have at most " + std::to_string(L::kMostRows) + " pixels, got " +
           std::to_string(height) + "x" + std::to_string(width);
  return "";
}

// As many slots as possible, but none more for the price of a group or of streaming in_factor.
Geometry sm90a_cut(const Problem& p, int64_t& bytes) {
  constexpr int kLeastSlots = 2;
  Geometry g = geometry_of(p, 1, L::kTileSide, L::kTileSide, kLeastSlots, 1);
  const L least = sm90a_layout(g);
  bytes = least.bytes;
  for (; g.stages < kMaxStages; ++g.stages) {
    Geometry more = g;
    ++more.stages;
    const L layout = sm90a_layout(more);
    if (layout.bytes > L::kMostBytes || layout.groups != least.groups || layout.streamed != least.streamed) break;
  }
  return g;
}

int64_t sm90a_ctas(const Geometry& g, const GpuCaps& caps) {
  return std::min<int64_t>(g.tiles(), caps.multiprocessors);
}

// Of a warpgroup of the busiest CTA. A step is one wgmma of depth 16.
FusedFeatures sm90a_features(const Geometry& g, const GpuCaps& caps) {
  const L layout = sm90a_layout(g);
  const double tiles = double(ceil_div(ceil_div(g.tiles(), sm90a_ctas(g, caps)), int64_t(layout.groups)));
  const double factor_blocks = layout.streamed ? 0 : layout.slices;
  FusedFeatures found{};
  found[kCtas] = 1;
  found[kCopies] = factor_blocks + layout.chunks + g.taps() * (layout.ranks / double(L::kSlice));  // blocks of factors
  found[kChunks] = tiles * layout.slices * (layout.streamed ? 1.5 : 1);
  found[kProducts] = tiles * g.taps() * layout.ranks / 16.0;
  found[kOutputs] = tiles * layout.chunks;
  found[kWaits] = tiles;
  return found;
}

double sm90a_flops(const Geometry& g) {
  const L layout = sm90a_layout(g);
  const double first = double(layout.rows) * L::kSlice * layout.slices * L::kSlice;
  const double middle = double(L::kSlice) * g.taps() * layout.ranks * layout.ranks;
  const double last = double(L::kSlice) * layout.chunks * L::kSlice * layout.ranks;
  return 2 * double(g.tiles()) * (first + middle + last);
}

}  // namespace lowrank_ops
