// The counts of the cost model (cost.h), and the seconds that it predicts from them.
#include <algorithm>
#include <string_view>
#include <utility>

#include "plan/cpu/cost.h"

namespace lowrank_ops {
namespace {

// The register blocks of an instruction set (cpu/kernels/gemm.h): the lanes of a vector, the vectors of a full panel,
// and the rows of a block by its width in vectors.
struct Registers {
  int64_t lanes, vectors;
  int64_t rows[5];
};
Registers registers_of(const CpuCaps& caps) {
  if (caps.isa == "generic") return {4, 2, {0, 12, 6, 0, 0}};
  if (caps.isa == "avx2") return {8, 2, {0, 12, 6, 0, 0}};
  return {16, 4, {0, 14, 14, 8, 6}};
}

// A product of a stage as the register kernel sees it: `calls` times `rows` rows, `depth` deep, `width` wide.
struct Product {
  double calls;
  int64_t rows, depth, width;
};

double panels(const Registers& registers, int64_t width) {
  return double(ceil_div(width, registers.lanes * registers.vectors));
}

double padded(const Registers& registers, int64_t width) {
  return double(round_up(width, registers.lanes));
}

double steps(const Registers& registers, const Product& product) {
  const int64_t vectors = ceil_div(product.width, registers.lanes), rest = vectors % registers.vectors;
  const auto blocks = [&](int64_t count) { return ceil_div(product.rows, registers.rows[count]); };
  const int64_t whole = vectors / registers.vectors * blocks(registers.vectors);
  return product.calls * double(product.depth) * double(whole + (rest > 0 ? blocks(rest) : 0));
}

// The sum over i in [0, n) of floor((a * i + b) / m), for a and b >= 0: Euclid's algorithm on the points of a lattice
// below a line, in as many steps as a greatest common divisor takes. Exact below 2^53.
double floor_sum(int64_t n, int64_t m, int64_t a, int64_t b) {
  double sum = 0;
  while (n > 0) {
    sum += double(n - 1) * double(n) / 2 * double(a / m) + double(n) * double(b / m);
    a %= m;
    b %= m;
    const int64_t last = a * n + b;  // the line climbs less than one step per point: count along the other axis
    n = last / m;
    b = last % m;
    std::swap(m, a);
  }
  return sum;
}

// The share of the windows' taps that lie inside the image, over all output rows (columns).
double share_inside(const Axis& axis) {
  // pairs_below(z) counts the pairs of a tap and an output that lie below z: for each tap ceil((z - tap * dilation) /
  // stride) outputs, at least 0 and at most all.
  const auto taps_before = [&](int64_t z) {  // the taps that lie below z for output 0
    return std::min(ceil_div(std::max<int64_t>(z, 0), axis.dilation), axis.kernel);
  };
  const auto pairs_below = [&](int64_t z) {
    const int64_t of_some = taps_before(z), of_all = taps_before(z - (axis.out - 1) * axis.stride);
    const int64_t least = z - (of_some - 1) * axis.dilation;  // the distance of the last such tap, where the sum begins
    return double(of_all) * double(axis.out) +
           (of_some > of_all ? floor_sum(of_some - of_all, axis.stride, axis.dilation, least + axis.stride - 1) : 0);
  };
  const double inside = pairs_below(axis.end_inside()) - pairs_below(axis.first_inside());
  return inside / std::max(double(axis.out) * double(axis.kernel), 1.0);
}

double beyond_l2(double bytes, const CpuCaps& caps) {
  return std::max(0.0, bytes - double(caps.l2_bytes));
}

// Values of an output whose rows lie whole pages apart: they meet in the same few lines of L1.
double odd_stores(const Problem& p) {
  constexpr int64_t kPage = 4096;
  const bool meets = p.t * element_bytes(p.dtype) % kPage == 0;
  return meets && (p.op == Op::kLinear || p.layout == Layout::kChannelsLast) ? double(p.n) * p.oh * p.ow * p.t : 0;
}

struct FusedStages {
  Product in, core, out;
};

FusedStages fused_products_of(const Problem& p, const CpuTile& tile) {
  if (p.op == Op::kLinear) return {{1, p.n, p.s, p.r1}, {}, {1, p.n, p.r1, p.t}};
  const int64_t parts = ceil_div(p.ow, tile.columns), columns = std::min(p.ow, tile.columns);
  const double images = double(p.n) * double(parts);
  const int64_t rows = std::min(p.oh, tile.rows);
  const Axis axis = column_axis(p);
  const int64_t inside = axis.end_inside() - axis.first_inside();                   // of the columns that are read
  const int64_t read = parts == 1 ? inside : std::min(inside, axis.span(columns));  // windows of two tiles overlap
  Product core = {};
  if (p.op == Op::kTucker) core = {images * double(p.oh), columns, p.r1 * p.kh * p.kw, p.r2};
  Product in = {images * double(p.h), std::max<int64_t>(read, 1), p.s, p.r1};
  if (p.ow == p.w && p.kw == 1 && parts == 1 && tile.winograd == Winograd::kNone) {  // rows of a step are one run
    in.calls = images * double(ceil_div(p.oh, rows));
    in.rows = ceil_div(p.h, ceil_div(p.oh, rows)) * p.w;
  }
  return {in, core, {images * double(ceil_div(p.oh, rows)), rows * columns, p.r2, p.t}};
}

// The counts of one stage, in whole vectors.
struct StageCounts {
  double products = 0, steps = 0, values = 0, dots = 0, taps = 0;
};

// Counts the first stage, which computes this product.
StageCounts first_counts(const Registers& registers, const Product& product, FirstStage way) {
  const double pixels = product.calls * double(product.rows), width = padded(registers, product.width);
  if (way == FirstStage::kDots) return {pixels * padded(registers, product.depth), 0, pixels, pixels};
  if (way == FirstStage::kPlanes) {  // pixels fill the vectors
    const double vectors = product.calls * padded(registers, product.rows);
    return {vectors * double(product.depth), 0, vectors};
  }
  return {pixels * double(product.depth) * width, steps(registers, product), pixels * width};
}

// Counts Tucker's core. Winograd computes it with fewer products; the direct core leaves out taps outside the image.
StageCounts core_counts(const Registers& registers, const Product& product, const Problem& p, const CpuTile& tile,
                        CoreStage way) {
  if (p.op != Op::kTucker) return {};
  const double pixels = product.calls * double(product.rows), width = padded(registers, product.width);
  StageCounts counts = {pixels * double(product.depth) * width, steps(registers, product), pixels * width};
  double share;
  if (tile.winograd != Winograd::kNone) {
    const double direct = double(p.n) * p.oh * p.ow * p.kh * p.kw * p.r1 * p.r2;
    const double outer = double(p.n) * (double(p.h) * p.w * p.s * p.r1 + double(p.oh) * p.ow * p.r2 * p.t);
    share = std::max(fused_products(p, tile) - outer, 0.0) / direct;
  } else {
    // Rows of taps outside the image are left out; columns only where there is a single output column. (Runs of columns
    // with the same taps, as cpu/direct_core.cpp has them, are not counted.)
    share = share_inside(row_axis(p)) * (p.ow == 1 ? share_inside(column_axis(p)) : 1);
    const int64_t runs = column_axis(p).dilation == 1 ? p.kh : p.kh * p.kw;  // of elements, per window
    counts.taps = product.calls * panels(registers, product.width) * double(runs) * share;
    if (way == CoreStage::kDots)
      counts = {pixels * double(runs) * padded(registers, product.depth / runs), 0, pixels, pixels, counts.taps};
    if (way == CoreStage::kPlanes) {
      const double vectors = product.calls * padded(registers, product.rows * column_axis(p).stride);
      counts = {vectors * double(product.depth), 0, pixels};
    }
  }
  counts.products *= share;
  counts.steps *= share;
  return counts;
}

// The feature "depthwise": multiply-adds of CP's depthwise stages, additions of Winograd's transforms.
double middle_sums(const Registers& registers, const Problem& p, const CpuCaps& caps, const CpuTile& tile) {
  if (p.op != Op::kCP) return p.op == Op::kTucker ? double(p.n) * winograd_sums(p, tile.winograd) : 0;
  if (p.r1 > 1 || in_pairs(p, caps) || tile.unpacked)
    return double(p.n) * depthwise_sums(p) / double(p.r1) * padded(registers, p.r1);
  // A plane has vectors along the pixels, and with a stride it computes one output at a time.
  const double outputs = p.stride[1] == 1 ? padded(registers, p.ow) : double(p.ow * registers.lanes);
  return double(p.n) * double(p.oh) * (double(p.kh) * padded(registers, p.w) + double(p.kw) * outputs);
}

Features unpacked_features(const Problem& p, const CpuCaps& caps, const CpuTile& tile, const Registers& registers) {
  const double rows = double(p.n) * double(p.h * p.w), out_rows = double(p.n) * double(p.oh * p.ow);
  return {1,
          rows * double(p.r1) * padded(registers, p.s) + out_rows * double(p.t) * padded(registers, p.r1),
          0,
          0,
          rows * double(p.r1) + out_rows * double(p.t),
          middle_sums(registers, p, caps, tile),
          block_bytes(p),
          beyond_l2(block_bytes(p), caps),
          0,
          0,
          0,
          0,
          0};
}

}  // namespace

Features fused_features(const Problem& p, const CpuCaps& caps, const CpuTile& tile) {
  const Registers registers = registers_of(caps);
  if (tile.unpacked) return unpacked_features(p, caps, tile, registers);
  const FusedStages stages = fused_products_of(p, tile);
  // A linear layer that packs its weights block by block has panels for any rank.
  const FirstStage way = p.op == Op::kLinear && tile.depth > 0 ? FirstStage::kPanels : first_stage(p);
  const StageCounts in = first_counts(registers, stages.in, way);
  const auto products = [&](const Product& product) {
    return product.calls * double(product.rows) * double(product.depth) * padded(registers, product.width);
  };
  const auto values = [&](const Product& product) {
    return product.calls * double(product.rows) * padded(registers, product.width);
  };
  const auto calls = [&](const Product& product) { return product.calls * panels(registers, product.width); };
  const CoreStage core_way = core_stage(p, tile.winograd, in_pairs(p, caps));
  const StageCounts core = core_counts(registers, stages.core, p, tile, core_way);
  const bool spreads = spreads_plane(p, tile.winograd, in_pairs(p, caps));
  StageCounts out = {products(stages.out), steps(registers, stages.out), values(stages.out)};
  if (spreads) {  // pixels fill the vectors
    const double vectors = stages.out.calls * padded(registers, stages.out.rows) * double(p.t);
    out = {vectors, 0, vectors};
  }
  const bool transposed = p.op != Op::kLinear && p.layout == Layout::kContiguous;
  const double moved = image_elements(p) -
                       (way == FirstStage::kPlanes ? double(p.n) * double(p.s) * double(p.h) * p.w : 0) -
                       (spreads ? double(p.n) * double(p.t) * double(p.oh) * p.ow : 0);
  const double in_place = (way == FirstStage::kPanels ? 0 : double(p.s) * double(p.r1)) +
                          (core_way != CoreStage::kPanels ? double(p.r1 * p.kh * p.kw) : 0) +
                          (spreads ? double(p.t) : 0);
  return {1,
          in.products + core.products + out.products,
          in.steps + core.steps + out.steps,
          in.values + core.values + out.values,
          in.dots + core.dots,
          middle_sums(registers, p, caps, tile),
          block_bytes(p),
          beyond_l2(block_bytes(p), caps),
          tile.prepared ? 0 : weight_elements(p) - in_place,
          transposed ? moved : 0,
          calls(stages.in) + calls(stages.core) + calls(stages.out) + (p.op == Op::kCP ? double(p.n) * p.oh : 0),
          core.taps,
          odd_stores(p)};
}

namespace {

// Whether torch runs a convolution of one image by its own code instead of oneDNN's (aten/native/Convolution.cpp,
// use_mkldnn).
bool is_native(const Problem& p, int64_t channels, int64_t height, int64_t width, int64_t kh, int64_t kw) {
  return p.dtype == DType::kFloat && p.n == 1 && (kh <= 3 || kw <= 3) && channels * height * width <= 20480;
}

}  // namespace

Features chain_features(const Problem& p, const CpuCaps& caps) {
  const double in_pixels = double(p.n) * p.h * p.w, out_pixels = double(p.n) * p.oh * p.ow;
  const double in = in_pixels * p.s * p.r1, out = out_pixels * p.r2 * p.t;
  const double hidden = hidden_bytes(p) / (2.0 * element_bytes(p.dtype));
  const double values = in_pixels * p.r1 + out_pixels * p.t + hidden;
  const double far = beyond_l2(block_bytes(p) + hidden_bytes(p), caps);
  if (p.op == Op::kLinear) return {2, in + out, values, 0, 0, 0, 0, far, weight_elements(p), 0, 0, 0, 0};
  const bool in_native = is_native(p, p.s, p.h, p.w, 1, 1), out_native = is_native(p, p.r2, p.oh, p.ow, 1, 1);
  const double native = (in_native ? in : 0) + (out_native ? out : 0);
  const bool tucker = p.op == Op::kTucker;
  // Elements of the matrix of windows that a core's product would have.
  const double core_columns = tucker ? out_pixels * double(p.r1 * p.kh * p.kw) : 0;
  const double inside = tucker ? share_inside(row_axis(p)) * share_inside(column_axis(p)) : 0;
  const bool core_native = tucker && is_native(p, p.r1, p.h, p.w, p.kh, p.kw);
  const double native_calls = double(in_native) + double(out_native) + double(core_native);
  const double core = core_native ? 0 : core_columns;
  return {(tucker ? 3 : 4) - native_calls,
          in + out - native,
          values,
          core * p.r2,
          core,
          core * p.r2 * inside,
          double(p.n) * depthwise_sums(p),
          far,
          weight_elements(p),
          native_calls,
          native,
          core_native ? core_columns * p.r2 : 0,
          core_native ? core_columns : 0};
}

namespace {

// A line of cost_constants.inc: nanoseconds per feature, for an op, a dtype and a layout on a class of instruction
// sets.
struct Constants {
  std::string_view isa;
  Op op;
  DType dtype;
  Layout layout;  // of a linear layer always kContiguous
  int ones;       // how many ranks of a Tucker block are one: libraries have special convolutions for one channel
  Features fused, chain;
};
constexpr Constants kConstants[] = {
#include "plan/cpu/cost_constants.inc"
};

const Constants* constants_for(const Problem& p, const CpuCaps& caps) {
  // fp32 is the same for all instruction sets of 16 lanes; those without bf16 products convert to fp32.
  const bool wide = caps.isa != "generic" && caps.isa != "avx2";
  const std::string_view isa = !wide                                              ? std::string_view(caps.isa)
                               : p.dtype == DType::kBFloat16 && caps.bfloat16_dot ? "avx512bf16"
                                                                                  : "avx512";
  const Layout layout = p.op == Op::kLinear ? Layout::kContiguous : p.layout;
  const int ones = p.op == Op::kTucker ? (p.r1 == 1) + (p.r2 == 1) : 0;
  for (const Constants& constants : kConstants)
    if (constants.isa == isa && constants.op == p.op && constants.dtype == p.dtype && constants.layout == layout &&
        constants.ones == ones)
      return &constants;
  return nullptr;
}

double seconds(const Features& features, const Features& constants) {
  double nanoseconds = 0;
  for (int i = 0; i < kFeatures; ++i) nanoseconds += features[i] * constants[i];
  return nanoseconds * 1e-9;
}

}  // namespace

double fused_seconds(const Problem& p, const CpuCaps& caps, const CpuTile& tile) {
  const Constants* constants = constants_for(p, caps);
  return constants ? seconds(fused_features(p, caps, tile), constants->fused) : 0;
}

double chain_seconds(const Problem& p, const CpuCaps& caps) {
  const Constants* constants = constants_for(p, caps);
  return constants ? seconds(chain_features(p, caps), constants->chain) : 0;
}

}  // namespace lowrank_ops
