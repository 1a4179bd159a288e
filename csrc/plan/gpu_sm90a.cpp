#include "plan/gpu_sm90a.h"

#include <algorithm>
#include <cstring>

namespace lowrank_ops {
namespace {

constexpr int kLeastSlots = 2;
constexpr int64_t kMostChannels = 65536;  // their slices' bytes fit into 32 bits

std::string number(int64_t value) {
  return std::to_string(value);
}
std::string pair(int64_t height, int64_t width) {
  return number(height) + "x" + number(width);
}
std::string above(const char* what, int64_t value, int64_t most) {
  return value <= most ? "" : std::string(what) + " must be at most " + number(most) + ", got " + number(value);
}

std::string tucker_reason(const Problem& p) {
  using L = TuckerSm90a;
  std::string reason = above("ranks", std::max(p.r1, p.r2), L::kMostRank);
  if (reason.empty()) reason = above("channels", std::max(p.s, p.t), kMostChannels);
  if (!reason.empty()) return reason;
  const int64_t height = L::kTileSide - 1 + p.kh, width = L::kTileSide - 1 + p.kw;
  if (height > L::kMostRows || width > L::kMostRows || height * width > L::kMostRows)
    return "a tile with its halo must have at most " + number(L::kMostRows) + " pixels, got " + pair(height, width);
  return "";
}

std::string cp_reason(const Problem& p) {
  using L = CpSm90a;
  if (p.kh != L::kTaps || p.kw != L::kTaps) return "the window must be 3x3, got " + pair(p.kh, p.kw);
  std::string reason = above("channels", std::max(p.s, p.t), L::kMostChannels);
  if (reason.empty()) reason = above("the rank", p.r1, L::kMostRank);
  if (reason.empty() && p.t % 32 != 0) reason = "output channels must be a multiple of 32, got " + number(p.t);
  return reason;
}

struct Tile {
  int height, width, most_slots, most_bytes;
};
Tile tile_of(Op op) {
  if (op == Op::kCP) return {CpSm90a::kTileHeight, CpSm90a::kTileWidth, kMaxStages, CpSm90a::kMostBytes};
  return {TuckerSm90a::kTileSide, TuckerSm90a::kTileSide, TuckerSm90a::kMostSlots, TuckerSm90a::kMostBytes};
}

}  // namespace

bool is_sm90a(const GpuKernel& kernel) {
  return std::strcmp(kernel.family, "sm90a") == 0;
}

std::string sm90a_reason(const Problem& p) {
  if (p.dtype != DType::kBFloat16 && p.dtype != DType::kHalf) return "takes bfloat16 and float16";
  if (p.layout != Layout::kChannelsLast) return "takes channels_last, the input is in NCHW";
  const CopyWidths widths = copy_widths(p);
  if (std::min({widths.input, widths.factor, widths.output}) < kVectorBytes)
    return "channels, ranks and strides must be multiples of 16 bytes";
  if (p.repeats) return "the input or a factor repeats elements (a stride of 0), which the copy engine cannot";
  if (p.stride[0] != 1 || p.stride[1] != 1) return "stride must be 1, got " + pair(p.stride[0], p.stride[1]);
  const bool dilated = (p.kh > 1 && p.dilation[0] != 1) || (p.kw > 1 && p.dilation[1] != 1);
  if (dilated) return "dilation must be 1, got " + pair(p.dilation[0], p.dilation[1]);
  return p.op == Op::kCP ? cp_reason(p) : tucker_reason(p);
}

// As many slots as possible, but for Tucker none more for the price of a group or of streaming in_factor.
Geometry sm90a_cut(const Problem& p, int64_t& bytes) {
  const Tile tile = tile_of(p.op);
  Geometry g = geometry_of(p, 1, tile.height, tile.width, kLeastSlots, 1);
  const TuckerSm90a least = sm90a_layout(g);
  bytes = sm90a_bytes(p.op, g);
  for (; g.stages < tile.most_slots; ++g.stages) {
    Geometry more = g;
    ++more.stages;
    if (sm90a_bytes(p.op, more) > tile.most_bytes) break;
    const TuckerSm90a layout = sm90a_layout(more);
    if (p.op == Op::kTucker && (layout.groups != least.groups || layout.streamed != least.streamed)) break;
  }
  return g;
}

int sm90a_bytes(Op op, const Geometry& g) {
  return op == Op::kCP ? cp_sm90a_layout(g).bytes : sm90a_layout(g).bytes;
}

int sm90a_threads(Op op) {
  return op == Op::kCP ? CpSm90a::kThreads : TuckerSm90a::kThreads;
}

int64_t sm90a_ctas(const Geometry& g, const GpuCaps& caps) {
  return std::min<int64_t>(g.tiles(), caps.multiprocessors);
}

int64_t sm90a_turns(Op op, const Geometry& g, const GpuCaps& caps) {
  const int groups = op == Op::kCP ? 1 : sm90a_layout(g).groups;  // CP's share a tile
  return ceil_div(ceil_div(g.tiles(), sm90a_ctas(g, caps)), int64_t(groups));
}

// Steps of products are wgmmas of depth 16 and 64 columns.
FusedFeatures sm90a_features(Op op, const Geometry& g, const GpuCaps& caps) {
  const double turns = double(sm90a_turns(op, g, caps));
  FusedFeatures found{};
  found[kCtas] = 1;
  found[kWaits] = turns;
  if (op == Op::kCP) {
    const CpSm90a layout = cp_sm90a_layout(g);
    found[kChunks] = turns * layout.slices;
    found[kDepthwise] = turns * layout.parts;
    found[kProducts] = turns * layout.parts * 4 * (1.25 * layout.slices + layout.channels / 64.0);
    found[kOutputs] = turns * layout.channels / 64;
    return found;
  }
  const TuckerSm90a layout = sm90a_layout(g);
  const double taps = g.taps() * layout.ranks / double(TuckerSm90a::kSlice);
  found[kCopies] = (layout.streamed ? 0 : layout.slices) + layout.chunks + taps;  // blocks of factors, once
  found[kChunks] = turns * layout.slices * (layout.streamed ? 1.5 : 1);
  found[kProducts] = turns * taps * layout.ranks / 16;
  found[kOutputs] = turns * layout.chunks;
  return found;
}

std::vector<std::string> sm90a_notes(Op op, const Geometry& g) {
  std::vector<std::string> notes;
  if (op == Op::kCP) return notes;
  const TuckerSm90a layout = sm90a_layout(g);
  if (layout.streamed) notes.push_back("in_factor is read anew for every tile: it does not fit into shared memory");
  if (layout.groups == 1) notes.push_back("one of two warpgroups computes: shared memory holds one hidden tile");
  return notes;
}

double sm90a_flops(Op op, const Geometry& g) {
  const double tiles = 2 * double(g.tiles()), slice = CpSm90a::kSlice;
  if (op == Op::kCP) {
    const CpSm90a layout = cp_sm90a_layout(g);
    const double rank = layout.parts * slice, pixels = CpSm90a::kTileHeight * CpSm90a::kTileWidth;
    const double first = CpSm90a::kHaloPixels * rank * layout.slices * slice;
    const double middle = rank * CpSm90a::kTaps * pixels * (1 + CpSm90a::kHaloWidth / double(CpSm90a::kTileWidth));
    return tiles * (first + middle + 2 * slice * layout.channels * rank);
  }
  const TuckerSm90a layout = sm90a_layout(g);
  const double first = layout.rows * slice * layout.slices * slice;
  const double middle = slice * g.taps() * layout.ranks * layout.ranks;
  return tiles * (first + middle + slice * layout.chunks * slice * layout.ranks);
}

}  // namespace lowrank_ops
