#include "plan/gpu_cost.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "plan/cost.h"

namespace lowrank_ops {
namespace {

// Of a launch: the op's and the library's own work on the CPU, and the gap between two dependent kernels on the GPU.
constexpr double kCpuLaunchSeconds = 4e-6;
constexpr double kGpuLaunchSeconds = 2.5e-6;

constexpr double kMemoryShare = 0.9;     // of a data sheet's bandwidth that a plain copy reaches
constexpr double kL2BytesPerClock = 24;  // a multiprocessor's: A100 3.7 TB/s, H100 6 TB/s when all of them read
constexpr double kSharedBytesPerClock = 128;
constexpr int kSector = 32;             // bytes that global memory moves at least
constexpr double kCopiesPerClock = 16;  // of single lanes: address, predicate and copy take two issue slots of 32
constexpr double kDepthwisePerClock = 1.0 / 4;  // sums of a lane: load, two conversions (or addresses), product

// Of the peak rate of mma.sync (FMA) with w warps on each of the four schedulers: kPeak * w / (w + kLatencyWarps). One
// warp alone waits for its own fragments about a third of the time.
constexpr double kMmaShare = 0.85, kSimtShare = 0.65, kLatencyWarps = 0.5;
constexpr int kSchedulers = 4;

constexpr double kExposedShared = 0.3;   // of the time of shared memory, what a lone warp does not hide behind products
constexpr double kLoadLatency = 500e-9;  // of a round of blocking loads
constexpr double kChunkLatency = 600e-9;  // a chunk's way out of L2 or memory, shared by stages - 1 in flight
constexpr double kChunkBarrier = 50e-9;   // a barrier, and the products that wait for it
constexpr double kCtaSeconds = 1e-6;      // tables of offsets, the first chunk, the last stores

// Registers of a thread beside its sums (fragments, addresses, loop state), as ptxas of CUDA 13.0 reports for sm_80 and
// sm_90: 93 to 124 in the kernels of CP and linear, 110 to 132 in Tucker's.
constexpr int kOtherRegisters = 104, kOtherTuckerRegisters = 120, kMostRegisters = 255;
constexpr int kRegisters = 65536, kMaxCtas = 16;  // of a multiprocessor; the least of all architectures
constexpr int64_t kReservedShared = 1024;         // the system's, of each CTA's shared memory

// The library's kernels: what they reach of the peak, their tiles, the start of one.
constexpr double kLibraryShare = 0.75;
constexpr double kLibraryPixels = 128, kLibraryColumns = 64, kLibraryDepth = 256;  // depth: of a split of K
constexpr double kLibrarySplits = 8;
constexpr double kLibraryKernelSeconds = 2e-6;
constexpr double kDepthwiseMemoryShare =
    0.25;  // depthwise 3x1 and 1x3 convs are far from the bandwidth in every layout

int lanes(const GpuCaps& caps) {  // FMA units of a multiprocessor
  return caps.architecture <= 80 ? 64 : 128;
}
double clock_of(const GpuCaps& caps) {
  return caps.fp32_flops / (2.0 * lanes(caps) * caps.multiprocessors);
}
double l2_bytes_per_second(const GpuCaps& caps) {
  return kL2BytesPerClock * clock_of(caps) * caps.multiprocessors;
}
bool tensor_dtype(const Problem& p) {  // whether the library takes tensor cores
  return p.dtype == DType::kBFloat16 || p.dtype == DType::kHalf || (p.dtype == DType::kFloat && p.tf32);
}
double kernel_flops(const Problem& p, const GpuKernel& kernel, const GpuCaps& caps) {
  if (p.dtype == DType::kDouble) return caps.fp64_flops;
  if (std::string(kernel.family) == "simt") return caps.fp32_flops;
  return p.dtype == DType::kFloat ? caps.tf32_flops : caps.fp16_flops;
}
double library_flops(const Problem& p, const GpuCaps& caps) {
  if (p.dtype == DType::kDouble) return caps.fp64_flops;
  if (!tensor_dtype(p)) return caps.fp32_flops;
  const double rate = p.dtype == DType::kFloat ? caps.library_tf32_flops : caps.library_fp16_flops;
  return rate > 0 ? rate : caps.fp32_flops;
}

// Bytes in whole sectors over bytes asked for, for runs of `run` contiguous bytes: aligned where they are whole
// sectors.
double sector_share(double run) {
  return std::fmod(run, kSector) == 0 ? 1 : (run + kSector) / run;
}

// How often ldmatrix must repeat for bank conflicts, on average: eight neighbouring pixels of a tile read rows of the
// hidden tile, which are odd multiples of 16 bytes apart, so that rows of equal remainder by 8 share their banks.
double bank_conflicts(const Geometry& g) {
  constexpr int kRows = 8;
  const int line = g.columns.halo() * g.rows.stride;
  int groups = 0, repeats = 0;
  for (int first = 0; first < g.rows.tile * g.columns.tile; first += kRows, ++groups) {
    int users[kRows] = {}, most_users = 0;
    for (int pixel = first; pixel < first + kRows; ++pixel) {
      const int row = pixel / g.columns.tile * line + pixel % g.columns.tile * g.columns.stride;
      most_users = std::max(most_users, ++users[row % kRows]);
    }
    repeats += most_users;
  }
  return double(repeats) / groups;
}

struct Counts {
  double products;  // bytes of operands that a warp's products read from shared memory
  double flops;
};
// Products of `steps` steps of depth, by every warp.
Counts products(const Config& c, int tiles, double conflicts, double steps, int element) {
  const double rows = 16.0 * tiles, columns = 8.0 * c.rank_tiles, warps = c.warps_m * c.warps_n;
  return {warps * steps * (rows * conflicts + columns) * kStepBytes,
          2 * warps * steps * rows * columns * (kStepBytes / element)};
}

bool by_pixel(const Problem& p) {  // whether a pixel's channels lie side by side
  return p.op == Op::kLinear || p.layout == Layout::kChannelsLast;
}

// Rounds of loads that a thread waits for: 16 bytes of 2-byte elements (8-byte ones) that no asynchronous copy takes.
double blocking_loads(double bytes, int64_t width, int element, const Config& c) {
  const bool asynchronous = width == 16 || width == 8 || (width == 4 && element <= 4);
  return asynchronous && !(width == 8 && element == 8) ? 0 : bytes / kVectorBytes / c.threads();
}

}  // namespace

GpuPhase last_phase(const Problem& p, const GpuKernel& kernel, const Geometry& g, const SharedLayout& l) {
  const Config& c = kernel.shape;
  const int element = int(element_bytes(p.dtype));
  const CopyWidths widths = copy_widths(p);
  const double pixels = g.pixels(), r2_bytes = l.second_row - kVectorBytes;
  const int64_t passes = ceil_div(ceil_div(g.t, c.columns()), g.splits);
  const double channels = double(std::min<int64_t>(g.t, passes * c.columns()));
  const double output = pixels * channels * element, out_factor = channels * g.r2 * element;
  const Counts last = products(c, c.pixel_tiles, 1, double(passes) * (r2_bytes / kStepBytes), element);
  GpuPhase phase;
  phase.multiply_flops = last.flops;
  phase.shared_bytes = last.products + out_factor + 2 * output;
  phase.l2_bytes = output * sector_share(double(by_pixel(p) ? g.t : g.columns.tile) * element) + out_factor;
  phase.copies = output / double(widths.output) + out_factor / double(widths.factor);
  phase.chunks = double(passes) * double(ceil_div(int64_t(r2_bytes), l.out_chunk));
  phase.blocking_loads = blocking_loads(out_factor, widths.factor, element, c);
  return phase;
}

GpuWork gpu_work(const Problem& p, const GpuKernel& kernel, const Geometry& g, const SharedLayout& l) {
  const Config& c = kernel.shape;
  const int element = int(element_bytes(p.dtype));
  const CopyWidths widths = copy_widths(p);
  const double halo = g.halo(), pixels = g.pixels();
  GpuWork work;

  // Chunks of 64 bytes of every halo pixel, and of every row of in_factor.
  const double chunks = double(ceil_div(int64_t(g.s) * element, kInputChunkBytes));
  const double passes = double(l.halo_passes) * l.r1_passes;
  const Counts first = products(c, c.halo_tiles, 1, passes * chunks * (kInputChunkBytes / kStepBytes), element);
  const double input = halo * g.s * element * l.r1_passes, in_factor = double(g.r1) * g.s * element * l.halo_passes;
  // In NCHW the runs are the halo's lines, or single elements of one where it has gaps.
  const double input_share =
      by_pixel(p)
          ? (int64_t(g.s) * element % kSector == 0 ? 1.0 : double(kInputChunkBytes + kSector) / kInputChunkBytes)
      : g.columns.unit == 1 ? sector_share(double(g.columns.halo()) * element)
                            : std::min<double>(g.columns.unit, double(kSector) / element);
  work.first.multiply_flops = first.flops;
  work.first.shared_bytes =
      first.products + passes * chunks * (c.halo_rows() + c.columns()) * kInputChunkBytes + halo * g.r1 * element;
  work.first.l2_bytes = input * input_share + in_factor;
  work.first.copies = input / double(widths.input) + in_factor / double(widths.factor);
  work.first.chunks = passes * chunks;
  work.first.blocking_loads =
      blocking_loads(input, widths.input, element, c) + blocking_loads(in_factor, widths.factor, element, c);

  if (p.op == Op::kTucker) {
    const double r1_bytes = l.hidden_row - kVectorBytes;
    const double core = double(g.r2) * g.taps() * g.r1 * element;
    const Counts middle = products(c, c.pixel_tiles, bank_conflicts(g),
                                   double(l.r2_passes) * g.taps() * (r1_bytes / kStepBytes), element);
    work.middle.multiply_flops = middle.flops;
    work.middle.shared_bytes = middle.products + core + pixels * g.r2 * element;
    work.middle.l2_bytes = core;
    work.middle.copies = core / double(widths.factor);
    work.middle.chunks = double(l.r2_passes) * g.taps() * double(ceil_div(int64_t(r1_bytes), l.core_chunk));
    work.middle.blocking_loads = blocking_loads(core, widths.factor, element, c);
  } else if (p.op == Op::kCP) {
    const double between = double(g.tile_n) * g.rows.tile * g.columns.halo();
    work.middle.depthwise_sums = g.r1 * (between * g.rows.kernel + pixels * g.columns.kernel);
    work.middle.shared_bytes = (work.middle.depthwise_sums + g.r1 * (between + pixels)) * element;
    work.middle.l2_bytes = double(g.r1) * (g.rows.kernel + g.columns.kernel) * element;
  }
  work.last = last_phase(p, kernel, g, l);
  return work;
}

int ctas_per_multiprocessor(const Problem& p, const GpuKernel& kernel, const GpuCaps& caps, int64_t shared_bytes) {
  const Config& c = kernel.shape;
  const int words = p.dtype == DType::kDouble ? 2 : 1;
  const int sums = 4 * std::max(c.halo_tiles, c.pixel_tiles) * c.rank_tiles * words;
  const int registers =
      std::min(sums + (p.op == Op::kTucker ? kOtherTuckerRegisters : kOtherRegisters), kMostRegisters);
  const int64_t by_registers = kRegisters / (int64_t(registers) * c.threads());
  const int64_t by_shared = caps.shared_bytes_multiprocessor / (shared_bytes + kReservedShared);
  return int(std::max<int64_t>(1, std::min({by_registers, by_shared, int64_t(kMaxCtas)})));
}

namespace {

// The seconds that a multiprocessor takes for `ctas` CTAs at a time.
class Multiprocessor {
 public:
  Multiprocessor(const Problem& p, const GpuKernel& kernel, const GpuCaps& caps, int stages)
      : warps_(kernel.shape.threads() / 32), stages_(stages), clock_(clock_of(caps)), lanes_(lanes(caps)) {
    const bool simt = std::string(kernel.family) == "simt";
    flops_ = kernel_flops(p, kernel, caps) / caps.multiprocessors * (simt ? kSimtShare : kMmaShare);
  }

  double seconds(const GpuWork& work, int64_t ctas) const {
    double alone = 0, multiply = 0, depthwise = 0, shared = 0, l2 = 0, copy = 0;
    for (const GpuPhase* phase : {&work.first, &work.middle, &work.last}) {
      const double products = phase->multiply_flops / flops_;
      const double sums = phase->depthwise_sums / (kDepthwisePerClock * lanes_ * clock_);
      const double shared_time = phase->shared_bytes / (kSharedBytesPerClock * clock_);
      const double l2_time = phase->l2_bytes / (kL2BytesPerClock * clock_);
      const double copies = phase->copies / (kCopiesPerClock * clock_);
      alone += phase->blocking_loads * kLoadLatency +
               std::max({(products + sums) / busy(1) + kExposedShared * shared_time + phase->chunks * kChunkBarrier,
                         shared_time, l2_time, copies, phase->chunks * kChunkLatency / (stages_ - 1)});
      multiply += products, depthwise += sums, shared += shared_time, l2 += l2_time, copy += copies;
    }
    const double together = std::max({(multiply + depthwise) / busy(ctas), shared, l2, copy});
    return std::max(alone, ctas * together) + kCtaSeconds;
  }

 private:
  double busy(int64_t ctas) const {
    const double warps = double(ctas) * warps_ / kSchedulers;
    return warps / (warps + kLatencyWarps);
  }

  double flops_, warps_, stages_, clock_, lanes_;
};

}  // namespace

void cost_fused(Plan& plan, const GpuWork& work, const Problem& p, const GpuKernel& kernel, const GpuCaps& caps,
                const SharedLayout& l) {
  const Geometry& g = plan.geometry;
  const int64_t together = ctas_per_multiprocessor(p, kernel, caps, l.bytes), sms = caps.multiprocessors;
  plan.shared_bytes = l.bytes;
  plan.threads = kernel.shape.threads();
  plan.ctas = g.ctas();
  plan.waves = double(plan.ctas) / double(sms * together);
  plan.flops = double(plan.ctas) * (work.first.multiply_flops + work.middle.multiply_flops +
                                    2 * work.middle.depthwise_sums + work.last.multiply_flops);
  // Neighbours' halos and the input's further passes come out of L2, as long as the CTAs at work fit into it.
  const double tile_bytes = double(g.halo()) * g.s * element_bytes(p.dtype);
  const double at_work = double(std::min(plan.ctas, sms * together)) * tile_bytes;
  plan.bytes = block_bytes(p);
  if (l.r1_passes > 1 && at_work > caps.l2_bytes / 2.0)
    plan.bytes += double(plan.ctas) * tile_bytes * (l.r1_passes - 1);

  const Multiprocessor multiprocessor(p, kernel, caps, g.stages);
  const int64_t rounds = plan.ctas / (sms * together), rest = plan.ctas - rounds * sms * together;
  double seconds = rounds > 0 ? double(rounds) * multiprocessor.seconds(work, together) : 0;
  if (rest > 0) seconds += multiprocessor.seconds(work, ceil_div(rest, sms));
  const double memory = plan.bytes / (caps.memory_bytes_per_second * kMemoryShare);
  plan.predicted_seconds = std::max(kCpuLaunchSeconds, kGpuLaunchSeconds + std::max(seconds, memory));
}

namespace {

// One library call of the chain: a matrix product of pixels x columns x depth, or a depthwise convolution.
struct LibraryStage {
  double pixels = 0, columns = 0, depth = 0;
  double in_bytes = 0, out_bytes = 0, weight_bytes = 0;
  bool cold_input = false, last = false, depthwise = false;
};

double stage_seconds(const LibraryStage& s, const Problem& p, const GpuCaps& caps) {
  const double memory = caps.memory_bytes_per_second * kMemoryShare;
  // What the stage before has just written is still in L2 if it fits there.
  const bool resident = s.in_bytes + s.out_bytes <= caps.l2_bytes / 2.0;
  const double in = s.in_bytes / (resident && !s.cold_input ? l2_bytes_per_second(caps) : memory);
  const double out = s.out_bytes / (resident && !s.last ? l2_bytes_per_second(caps) : memory);
  const double moved = in + out + s.weight_bytes / memory;
  if (s.depthwise) return kLibraryKernelSeconds + moved / kDepthwiseMemoryShare;
  // In doubles: a chain's sizes are bounded by nothing here.
  const double tile_columns = s.columns <= kLibraryColumns / 2 ? kLibraryColumns / 2 : kLibraryColumns;
  const double ctas = std::ceil(s.pixels / kLibraryPixels) * std::ceil(s.columns / tile_columns);
  const double splits = std::clamp(std::floor(s.depth / kLibraryDepth), 1.0, kLibrarySplits);
  const double filled = std::min(1.0, ctas * splits / caps.multiprocessors);
  const double flops = 2.0 * ctas * kLibraryPixels * tile_columns * s.depth;
  return kLibraryKernelSeconds + std::max(moved, flops / (library_flops(p, caps) * kLibraryShare * filled));
}

}  // namespace

Plan chain_plan(const Problem& p, const GpuCaps& caps) {
  const double element = double(element_bytes(p.dtype));
  const double in_pixels = double(p.n) * p.h * p.w, out_pixels = double(p.n) * p.oh * p.ow;
  std::vector<LibraryStage> stages;
  const auto add = [&](double from_pixels, double pixels, double columns, double in_channels, double depth) {
    stages.push_back({pixels, columns, depth, from_pixels * in_channels * element, pixels * columns * element,
                      columns * depth * element, stages.empty(), false, false});
  };
  add(in_pixels, in_pixels, double(p.r1), double(p.s), double(p.s));
  if (p.op == Op::kTucker) {
    add(in_pixels, out_pixels, double(p.r2), double(p.r1), double(p.r1) * p.kh * p.kw);
  } else if (p.op == Op::kCP) {
    const double between = double(p.n) * p.oh * p.w;
    add(in_pixels, between, double(p.r1), double(p.r1), double(p.kh));
    stages.back().depthwise = true;
    add(between, out_pixels, double(p.r1), double(p.r1), double(p.kw));
    stages.back().depthwise = true;
  }
  add(out_pixels, out_pixels, double(p.t), double(p.r2), double(p.r2));
  stages.back().last = true;

  Plan plan;
  plan.path = "chain";
  plan.kernel = "chain of torch ops";
  plan.flops = block_flops(p);
  plan.bytes = block_bytes(p) + hidden_bytes(p);
  // Tensor cores want channels last: in NCHW the library transposes around its convolutions (one kernel for each, input
  // and output through memory once more). The activation is a kernel of its own.
  const bool transposes = p.op != Op::kLinear && p.layout == Layout::kContiguous && tensor_dtype(p);
  int kernels = 0;
  double seconds = 0;
  const auto moves = [&](double bytes) {
    const bool resident = bytes <= caps.l2_bytes / 2.0;
    ++kernels;
    plan.bytes += bytes;
    return kLibraryKernelSeconds +
           bytes / (resident ? l2_bytes_per_second(caps) : caps.memory_bytes_per_second * kMemoryShare);
  };
  for (const LibraryStage& stage : stages) {
    ++kernels;
    seconds += stage_seconds(stage, p, caps);
    if (transposes && !stage.depthwise) seconds += moves(stage.in_bytes + stage.out_bytes);
  }
  if (p.activation != Activation::kNone) seconds += moves(2 * stages.back().out_bytes);
  plan.predicted_seconds = std::max(kernels * kCpuLaunchSeconds, kernels * kGpuLaunchSeconds + seconds);
  return plan;
}

}  // namespace lowrank_ops
