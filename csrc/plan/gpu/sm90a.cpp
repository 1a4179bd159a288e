#include "plan/gpu/sm90a.h"

#include <algorithm>
#include <numeric>

namespace lowrank_ops {
namespace {

constexpr int kLeastSlots = 2;
constexpr int64_t kMostChannels = 65536;  // with these the bytes of all slices fit into 32 bits

std::string number(int64_t value) {
  return std::to_string(value);
}
std::string size_text(int64_t height, int64_t width) {
  return number(height) + "x" + number(width);
}
std::string above(const char* what, int64_t value, int64_t most) {
  return value <= most ? "" : std::string(what) + " must be at most " + number(most) + ", got " + number(value);
}

// An axis in planes (planes.h), as its TileAxis will be, which has numbers of 32 bits.
struct PlanesOfAxis {
  int64_t stride = 1;               // in units
  int64_t classes = 1, planes = 1;  // planes: of a class
  int64_t halo = 1;                 // pixels that a tile reads of the plane with the most taps
  bool empty_class = false;

  PlanesOfAxis(const Problem& p, int axis) {
    const int64_t kernel = axis == 0 ? p.kh : p.kw, outputs = axis == 0 ? p.oh : p.ow;
    const int64_t common = kernel == 1 ? p.stride[axis] : std::gcd(p.stride[axis], p.dilation[axis]);
    stride = p.stride[axis] / common;
    if (kernel > 1) classes = p.dilation[axis] / common;
    planes = std::min(stride, kernel);
    halo = TuckerSm90a::kTileSide - 1 + ceil_div(kernel, stride);
    empty_class = classes > outputs;
  }
  // At most `most` planes: factors up to it, whose product cannot overflow.
  bool few(int64_t most) const { return classes <= most && planes <= most; }
};

std::string stride_and_dilation(const Problem& p) {
  return "stride " + size_text(p.stride[0], p.stride[1]) + " and dilation " + size_text(p.dilation[0], p.dilation[1]);
}
// Why a kernel that takes classes of the output cannot take those of a problem; "": it can.
std::string classes_reason(const Problem& p, const PlanesOfAxis& rows, const PlanesOfAxis& columns) {
  if (!rows.empty_class && !columns.empty_class) return "";
  return "the output must not be smaller than the dilation " + size_text(p.dilation[0], p.dilation[1]) + ", got " +
         size_text(p.oh, p.ow);
}

// Why the planes of a problem are too many or too few for a Tucker kernel; "": they are not.
std::string planes_reason(const Problem& p, const PlanesOfAxis& rows, const PlanesOfAxis& columns) {
  const bool few = rows.few(kMostPlanes) && columns.few(kMostPlanes) &&
                   rows.classes * rows.planes * columns.classes * columns.planes <= kMostPlanes;
  if (!few)
    return "stride and dilation must cut the window into at most " + number(kMostPlanes) +
           " planes (such as 2x2), got " + stride_and_dilation(p);
  return classes_reason(p, rows, columns);
}

// Why a Tucker kernel cannot take the ranks, the channels or the window of a problem; "": it can. `most_pixels`: of a
// tile with its halo.
std::string tucker_reason(const Problem& p, int most_rank, int most_pixels) {
  const PlanesOfAxis rows(p, 0), columns(p, 1);
  std::string reason = planes_reason(p, rows, columns);
  if (reason.empty()) reason = above("ranks", std::max(p.r1, p.r2), most_rank);
  if (reason.empty()) reason = above("channels", std::max(p.s, p.t), kMostChannels);
  if (!reason.empty()) return reason;
  if (rows.halo > most_pixels || columns.halo > most_pixels || rows.halo * columns.halo > most_pixels)
    return "a tile with its halo must have at most " + number(most_pixels) + " pixels, got " +
           size_text(rows.halo, columns.halo);
  return "";
}
std::string tucker_reason(const Problem& p) {
  return tucker_reason(p, TuckerSm90a::kMostRank, TuckerSm90a::kMostRows);
}

Geometry tucker_cut(const Problem& p, int slots) {
  return geometry_of(p, 1, TuckerSm90a::kTileSide, TuckerSm90a::kTileSide, slots, 1);
}
// Where shared memory holds only two slots the wide kernel is faster, although it reads the factors anew for each pair
// of tiles (on an H200, 256 channels and ranks of 64: 45 us against 52).
constexpr int kLeastSharedSlots = 3;

std::string wide_reason(const Problem& p) {
  const std::string reason = tucker_reason(p, TuckerWideSm90a::kMostRank, TuckerWideSm90a::kRows);
  if (!reason.empty()) return reason;
  const bool other_fits =
      tucker_reason(p).empty() && sm90a_layout(tucker_cut(p, kLeastSharedSlots)).bytes <= TuckerSm90a::kMostBytes;
  return other_fits ? "ranks up to " + number(TuckerSm90a::kMostRank) + " have a kernel of their own" : "";
}

std::string cp_reason(const Problem& p) {
  using L = CpSm90a;
  if (p.kh != L::kTaps || p.kw != L::kTaps) return "the window must be 3x3, got " + size_text(p.kh, p.kw);
  const PlanesOfAxis rows(p, 0), columns(p, 1);
  if (std::max(rows.stride, columns.stride) > L::kMostStride)
    return "stride, divided by its greatest common divisor with the dilation, must be at most " +
           number(L::kMostStride) + ", got " + stride_and_dilation(p);
  if (std::max(rows.classes, columns.classes) > kMostPlanes || rows.classes * columns.classes > kMostPlanes)
    return "dilation must cut the output into at most " + number(kMostPlanes) + " residue classes (such as 2x2), got " +
           stride_and_dilation(p);
  std::string reason = classes_reason(p, rows, columns);
  if (reason.empty()) reason = above("channels", std::max(p.s, p.t), L::kMostChannels);
  if (reason.empty()) reason = above("the rank", p.r1, L::kMostRank);
  if (reason.empty() && p.t % 32 != 0) reason = "output channels must be a multiple of 32, got " + number(p.t);
  return reason;
}

}  // namespace

bool is_sm90a(const GpuKernel& kernel) {
  return kernel.family == Family::kSm90a;
}

bool is_wide_sm90a(const GpuKernel& kernel) {
  return is_sm90a(kernel) && kernel.config == kSm90aWideConfig;
}

std::string sm90a_reason(const Problem& p, const GpuKernel& kernel) {
  if (p.dtype != DType::kBFloat16 && p.dtype != DType::kHalf) return "takes bfloat16 and float16";
  if (p.op != Op::kLinear && p.layout != Layout::kChannelsLast) return "takes channels_last, the input is in NCHW";
  const CopyWidths widths = copy_widths(p);
  if (std::min({widths.input, widths.factor, widths.output}) < kVectorBytes)
    return "channels, ranks and strides must be multiples of 16 bytes";
  if (p.repeats)
    return "the input or a factor repeats elements (a stride of 0, rows that overlap): TMA copies take none of those";
  if (p.op == Op::kLinear) return above("the rank", p.r1, LinearSm90a::kMostRank);
  if (p.op == Op::kCP) return cp_reason(p);
  return is_wide_sm90a(kernel) ? wide_reason(p) : tucker_reason(p);
}

namespace {

// `g` with as many slots as `fits` allows, from its own number to `most`.
template <typename Fits>
Geometry most_slots(Geometry g, int most, const Fits& fits) {
  for (Geometry more = g; more.stages <= most && fits(more); ++more.stages) g = more;
  return g;
}

}  // namespace

Geometry sm90a_cut(const Problem& p, const GpuKernel& kernel) {
  if (p.op == Op::kCP) {
    using L = CpSm90a;
    const int stride_h = int(PlanesOfAxis(p, 0).stride), stride_w = int(PlanesOfAxis(p, 1).stride);
    const Geometry cut = geometry_of(p, 1, cp_tile_height(stride_h, stride_w), cp_tile_width(stride_w), kLeastSlots, 1);
    return most_slots(cut, kMaxStages, [](const Geometry& g) { return cp_sm90a_layout(g).bytes <= L::kMostBytes; });
  }
  if (p.op == Op::kLinear) {
    using L = LinearSm90a;
    return most_slots(geometry_of(p, 1, 1, L::kRows, L::kLeastSlots, 1), L::kMostSlots,
                      [](const Geometry& g) { return linear_sm90a_layout(g).bytes <= L::kMostBytes; });
  }
  if (!is_wide_sm90a(kernel))
    return most_slots(tucker_cut(p, kLeastSharedSlots), TuckerSm90a::kMostSlots,
                      [](const Geometry& g) { return sm90a_layout(g).bytes <= TuckerSm90a::kMostBytes; });
  // The factors' ring takes the rest of shared memory; with this many slots it covers the way of its blocks through L2.
  constexpr int kEnough = 4;
  return most_slots(tucker_cut(p, kLeastSlots), kMaxStages, [](const Geometry& g) {
    const TuckerWideSm90a layout = wide_sm90a_layout(g);
    return layout.bytes <= TuckerWideSm90a::kMostBytes && layout.slots >= kEnough;
  });
}

int sm90a_bytes(const GpuKernel& kernel, const Geometry& g) {
  if (kernel.op == Op::kCP) return cp_sm90a_layout(g).bytes;
  if (kernel.op == Op::kLinear) return linear_sm90a_layout(g).bytes;
  return is_wide_sm90a(kernel) ? wide_sm90a_layout(g).bytes : sm90a_layout(g).bytes;
}

int sm90a_threads(const GpuKernel& kernel) {
  if (kernel.op == Op::kCP) return CpSm90a::kThreads;
  if (kernel.op == Op::kLinear) return LinearSm90a::kThreads;
  return is_wide_sm90a(kernel) ? TuckerWideSm90a::kThreads : TuckerSm90a::kThreads;
}

int sm90a_most_cluster(const GpuKernel& kernel, int64_t tiles, const GpuCaps& caps) {
  return is_sm90a(kernel) && kernel.op != Op::kTucker && tiles > 1 && caps.multiprocessors > 1 ? 2 : 1;
}

int64_t sm90a_ctas(const Geometry& g, const GpuCaps& caps) {
  return std::min<int64_t>(g.ctas(), caps.multiprocessors / g.cluster * g.cluster);
}

int64_t sm90a_turns(const GpuKernel& kernel, const Geometry& g, const GpuCaps& caps) {
  const int64_t groups = kernel.op == Op::kTucker ? TuckerSm90a::kGroups : 1;  // the others' warpgroups share a tile
  return ceil_div(ceil_div(g.ctas(), sm90a_ctas(g, caps)), groups);
}

namespace {

// kProducts counts wgmmas of depth 16 and 64 columns. kDepthwise counts parts. A lane reads 4x3 hidden pixels for two
// outputs, with a stride along the height 3x3 for one.
void count_cp(FusedFeatures& found, double turns, const Geometry& g, const CpSm90a& layout) {
  found[kChunks] = turns * layout.slices;
  found[kDepthwise] = turns * layout.parts * (g.rows.stride == 1 ? 1 : 0.75);
  found[kProducts] = turns * layout.parts * 4 * (1.25 * layout.slices + layout.channels / 64.0);
  found[kOutputs] = turns * layout.channels / 64;
}

void count_tucker(FusedFeatures& found, double turns, const Geometry& g, const TuckerSm90a& layout) {
  const double taps = g.taps() * layout.ranks / double(TuckerSm90a::kSlice);
  found[kCopies] = layout.slices + layout.chunks + taps;  // blocks of factors, copied once per CTA
  found[kChunks] = turns * planes_of(g) * layout.slices;
  found[kProducts] = turns * taps * layout.ranks / 16;
  found[kOutputs] = turns * layout.chunks;
}

// kProducts counts blocks of the core, which both groups multiply; all counts are in units of 128 ranks.
void count_wide(FusedFeatures& found, double turns, const Geometry& g, const TuckerWideSm90a& layout) {
  found[kChunks] = turns * planes_of(g) * layout.slices * layout.r1_parts / 2.0;
  found[kProducts] = turns * g.taps() * layout.r1_parts * layout.r2_parts / 2.0;
  found[kOutputs] = turns * layout.chunks * layout.r2_parts / 2.0;
}

// In units of the wide kernel, whose constants serve (cost_constants.inc): it moves 74 KiB between L2 and shared memory
// per slice and chunk of 128 ranks (two slices of 104 pixels, two blocks of factors, two chunks of the output). A
// cluster's CTAs share the copies of the factors; what meeting each other costs them was not measured and counts
// nothing.
void count_linear(FusedFeatures& found, double turns, const Geometry& g, const LinearSm90a& layout) {
  constexpr double kWideBytes = 2 * TuckerWideSm90a::kSliceBytes + 6 * TuckerWideSm90a::kPartBytes;
  const double block = double(layout.block_bytes()) / g.cluster;
  const double slice = LinearSm90a::kInputBytes + block;
  const double chunk = LinearSm90a::kGroups * LinearSm90a::kPartBytes + block;
  const double chunks = double(ceil_div(layout.chunks, g.splits));
  found[kChunks] = turns * (layout.slices * slice + chunks * chunk) / kWideBytes;
}

double cp_flops(const Geometry& g, const CpSm90a& layout) {
  const double slice = CpSm90a::kSlice, rank = layout.parts * slice;
  const double first = CpSm90a::kHaloPixels * rank * layout.slices * slice;
  const double middle = rank * CpSm90a::kTaps * g.rows.tile * (g.columns.tile + g.columns.halo());
  return first + middle + 2 * slice * layout.channels * rank;
}

// Multiply-adds per tile of 128 rows.
double linear_flops(const Geometry& g, const LinearSm90a& layout) {
  const double rank = layout.parts * LinearSm90a::kSlice, slices = double(g.splits) * layout.slices;
  return LinearSm90a::kRows * rank * (slices + layout.chunks) * LinearSm90a::kSlice;
}

// Multiply-adds per tile of 64 pixels. `first_rows`: ranks that stage 1 computes for every plane; `r1`, `r2`: the
// ranks, padded.
double tucker_flops(const Geometry& g, double halo_rows, double first_rows, double r1, double r2) {
  const double s = double(round_up(g.s, 64)), t = double(round_up(g.t, 64));
  return planes_of(g) * halo_rows * first_rows * s + 64 * (g.taps() * r1 * r2 + t * r2);
}

}  // namespace

FusedFeatures sm90a_features(const GpuKernel& kernel, const Geometry& g, const GpuCaps& caps) {
  const double turns = double(sm90a_turns(kernel, g, caps));
  FusedFeatures found{};
  found[kCtas] = 1;
  // One per passage from stage 1 to stage 2. With planes that is a cautious guess: no GPU has timed them.
  found[kWaits] = turns * (kernel.op == Op::kTucker ? planes_of(g) : 1);
  if (kernel.op == Op::kCP)
    count_cp(found, turns, g, cp_sm90a_layout(g));
  else if (kernel.op == Op::kLinear)
    count_linear(found, turns, g, linear_sm90a_layout(g));
  else if (is_wide_sm90a(kernel))
    count_wide(found, turns, g, wide_sm90a_layout(g));
  else
    count_tucker(found, turns, g, sm90a_layout(g));
  return found;
}

double sm90a_flops(const GpuKernel& kernel, const Geometry& g) {
  const double tiles = 2 * double(round_up(g.tiles(), g.cluster));
  if (kernel.op == Op::kCP) return tiles * cp_flops(g, cp_sm90a_layout(g));
  if (kernel.op == Op::kLinear) return tiles * linear_flops(g, linear_sm90a_layout(g));
  if (is_wide_sm90a(kernel)) {
    const TuckerWideSm90a layout = wide_sm90a_layout(g);
    const double r1 = layout.r1_parts * 64, r2 = layout.r2_parts * 64;
    return tiles * tucker_flops(g, layout.kRows, r1, r1, r2);
  }
  const TuckerSm90a layout = sm90a_layout(g);
  return tiles * tucker_flops(g, layout.rows, TuckerSm90a::kSlice, layout.ranks, layout.ranks);
}

}  // namespace lowrank_ops
