#include "plan/gpu/cost.h"

#include <algorithm>
#include <string>

#include "plan/counts.h"
#include "plan/gpu/sm90a.h"

namespace lowrank_ops {
namespace {

#include "plan/gpu/cost_constants.inc"

// The share by which each further warp on a scheduler slows all of them: they wait for each other's instructions.
constexpr double kContention = 0.12;
constexpr int kSchedulers = 4;
constexpr double kMemoryShare = 0.9;   // of the bandwidth in known_gpus.cpp (a copy reaches 0.89 on an H200)
constexpr double kProductShare = 0.9;  // of the peak rate of mma.sync, wgmma or the FMA units
constexpr double kOtherLines = 3;      // clocks per multiply-add, relative to a line of three taps with a stride of 1
constexpr double kFusedCall = 10e-6;   // CPU time until a fused call returns (an H200's host, Sapphire Rapids)

// Registers per thread beside its sums (fragments, addresses, loop state), as ptxas of CUDA 13.0 reports for sm_80 and
// sm_90: 93 to 124 in the kernels of CP and linear, 110 to 132 in Tucker's.
constexpr int kOtherRegisters = 104, kOtherTuckerRegisters = 120, kMostRegisters = 255;
constexpr int kRegisters = 65536,
              kMaxCtas = 16;               // per multiprocessor; kMaxCtas: the limit that all architectures reach
constexpr int64_t kReservedShared = 1024;  // the system's part of each CTA's shared memory

double peak_flops(const Problem& p, const GpuKernel& kernel, const GpuCaps& caps) {
  if (p.dtype == DType::kDouble) return caps.fp64_flops;
  if (is_simt(kernel)) return caps.fp32_flops;
  if (is_sm90a(kernel)) return caps.library_fp16_flops;
  return p.dtype == DType::kFloat ? caps.tf32_flops : caps.fp16_flops;
}

const FusedConstants& constants_of(const Problem& p, const GpuKernel& kernel) {
  if (is_simt(kernel)) return kSimt;
  if (is_wide_sm90a(kernel)) return kSm90aWide;
  if (is_sm90a(kernel)) return p.op == Op::kCP ? kSm90aCp : p.op == Op::kLinear ? kSm90aLinear : kSm90aTucker;
  const bool words = element_bytes(p.dtype) == 4;
  if (is_lean(p, kernel)) return words ? kLeanWords : kLeanHalves;
  return words ? kSm80Words : kSm80Halves;
}

// How often ldmatrix has to read because of bank conflicts, on average (1: no conflicts). Eight neighbouring pixels of
// a tile read rows of the hidden tile. Rows are an odd multiple of 16 bytes apart, so those with equal remainder by 8
// share their banks.
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

// kProducts of a warp: `tiles` tiles of 16 rows times the warp's columns, over `steps` steps of depth.
double products(const Config& c, bool simt, int tiles, double steps) {
  // Without tensor cores a step is 16 x 8 x 8 multiply-adds in four-byte elements, 32 per thread.
  return tiles * c.rank_tiles * steps * (simt ? 0.5 : 1);
}

// The work of one CTA, counted per warp or per thread as FusedFeature says. Passes, chunks and rows are those that the
// kernel goes through, padding included. A CTA of a persistent kernel has many tiles: counted is the work of one of
// them, where stages 2 and 3 count as one chunk each, for their barriers. A tile counts as a whole CTA (kCtas),
// although its first chunks arrive under the stages before.
class Counter {
 public:
  Counter(const Problem& p, const GpuKernel& kernel, const Geometry& g, const SharedLayout& l)
      : p_(p),
        c_(kernel.shape),
        g_(g),
        l_(l),
        widths_(copy_widths(p)),
        simt_(is_simt(kernel)),
        element_(int(element_bytes(p.dtype))) {
    found_[kCtas] = 1;
    first_stage();
    if (p.op == Op::kTucker) core_stage();
    if (p.op == Op::kCP) depthwise_stage();
    last_stage();
    if (c_.persistent) found_[kChunks] += 2;
    found_[kWaits] += found_[kChunks] / (g.stages - 1);
  }
  FusedFeatures found() const { return found_; }
  // What a persistent CTA does once, before its first tile.
  FusedFeatures once() const { return once_; }
  // Multiply-adds per CTA: of the matrix products, and of the depthwise stages.
  double multiply_adds() const { return multiply_adds_; }
  double depthwise_sums() const { return depthwise_; }

 private:
  // Copies `vectors` vectors of 16 bytes, `width` bytes at a time.
  void copy(double vectors, int64_t width) {
    const bool asynchronous = width >= 4 && (width > element_ || element_ <= 4);
    const double per_thread = vectors / c_.threads();
    if (asynchronous)
      found_[kCopies] += per_thread * double(kVectorBytes / width);
    else
      found_[kLoads] += per_thread * double(kVectorBytes / element_);
  }
  void multiply(int tiles, double steps, double conflicts = 1) {
    found_[kProducts] += products(c_, simt_, tiles, steps) * (1 + 0.25 * (conflicts - 1));
    const double warps = c_.warps_m * c_.warps_n;
    multiply_adds_ += warps * 16 * tiles * 8 * c_.rank_tiles * steps * (kStepBytes / element_);
  }
  // Streams a factor: `passes` passes over its rows, each row's `row_bytes` in chunks of `chunk` bytes.
  void stream(double passes, double row_bytes, int chunk, int tiles, double conflicts = 1) {
    const double chunks = passes * double(ceil_div(int64_t(row_bytes), chunk));
    const double vectors = passes * c_.columns() * row_bytes / kVectorBytes;
    if (c_.persistent) {
      once_[kWaits] += chunks;
      once_[kCopies] += vectors / c_.threads();
    } else {
      found_[kChunks] += chunks;
      copy(vectors, widths_.factor);
    }
    multiply(tiles, passes * row_bytes / kStepBytes, conflicts);
  }

  void first_stage() {
    const double passes = double(l_.halo_passes) * l_.r1_passes;
    const double row_bytes = double(ceil_div(int64_t(g_.s) * element_, kInputChunkBytes)) * kInputChunkBytes;
    copy(passes * c_.halo_rows() * row_bytes / kVectorBytes, widths_.input);
    if (c_.persistent) found_[kChunks] += passes * row_bytes / kInputChunkBytes;
    stream(passes, row_bytes, kInputChunkBytes, c_.halo_tiles);
    found_[kStores] += passes * c_.halo_tiles * c_.rank_tiles * 4;
  }
  void core_stage() {
    const double passes = double(l_.r2_passes) * g_.taps(), row_bytes = l_.hidden_row - kVectorBytes;
    stream(passes, row_bytes, l_.core_chunk, c_.pixel_tiles, bank_conflicts(g_));
    found_[kStores] += l_.r2_passes * c_.pixel_tiles * c_.rank_tiles * 4.0;
  }
  void depthwise_stage() {
    const double between = double(g_.tile_n) * g_.rows.tile * g_.columns.halo();
    const double height = g_.r1 * between * g_.rows.kernel;
    const double width = g_.r1 * double(g_.pixels()) * g_.columns.kernel;
    const auto weight = [](const TileAxis& axis) { return axis.kernel == 3 && axis.stride == 1 ? 1.0 : kOtherLines; };
    depthwise_ = height + width;
    found_[kDepthwise] += (height * weight(g_.rows) + width * weight(g_.columns)) / c_.threads();
  }
  void last_stage() {
    const double passes = double(ceil_div(ceil_div(g_.t, c_.columns()), g_.splits));
    stream(passes, l_.second_row - kVectorBytes, l_.out_chunk, c_.pixel_tiles);
    const double values = passes * c_.pixels() * c_.columns() / c_.threads();
    found_[kOutputs] +=
        values * element_ / kVectorBytes * (widths_.output < kVectorBytes ? kVectorBytes / element_ : 1);
  }

  const Problem& p_;
  const Config& c_;
  const Geometry& g_;
  const SharedLayout& l_;
  const CopyWidths widths_;
  const bool simt_;
  const int element_;
  FusedFeatures found_{}, once_{};
  double multiply_adds_ = 0, depthwise_ = 0;
};

// The factor by which `ctas` CTAs on a multiprocessor, which share its schedulers, lengthen each other's time.
double contention_of(const GpuKernel& kernel, double ctas) {
  return 1 + kContention * std::max(0.0, ctas * kernel.shape.threads() / 32 / kSchedulers - 1);
}

// How many rounds of CTAs the busiest multiprocessor goes through, each lengthened by the contention of its warps; of
// tiles, if CTAs are persistent. `together`: CTAs that a multiprocessor holds at a time.
double rounds(const Geometry& g, const GpuKernel& kernel, const GpuCaps& caps, int64_t together) {
  const auto contention = [&](double ctas) { return contention_of(kernel, ctas); };
  const int64_t whole = g.ctas() / (caps.multiprocessors * together);
  const int64_t rest = g.ctas() - whole * caps.multiprocessors * together;
  const int64_t last = ceil_div(rest, caps.multiprocessors);
  return double(whole) * contention(double(together)) + (rest > 0 ? contention(double(last)) : 0);
}

// One CTA's counts times the rounds of the busiest multiprocessor.
FusedFeatures features_of(const Counter& counter, const Geometry& g, const GpuKernel& kernel, const GpuCaps& caps,
                          int64_t together) {
  FusedFeatures found = counter.found();
  const double times = rounds(g, kernel, caps, together), once = contention_of(kernel, double(together));
  for (int i = 0; i < kFusedFeatures; ++i) found[i] = found[i] * times + counter.once()[i] * once;
  return found;
}

}  // namespace

double clock_of(const GpuCaps& caps) {
  const int lanes = caps.architecture <= 80 ? 64 : 128;  // FMA units per multiprocessor
  return caps.fp32_flops / (2.0 * lanes * caps.multiprocessors);
}

int ctas_per_multiprocessor(const Problem& p, const GpuKernel& kernel, const GpuCaps& caps, int64_t shared_bytes) {
  const Config& c = kernel.shape;
  const int words = p.dtype == DType::kDouble ? 2 : 1;
  const int sums = 4 * std::max(c.halo_tiles, c.pixel_tiles) * c.rank_tiles * words;
  const int registers =
      std::min(sums + (p.op == Op::kTucker ? kOtherTuckerRegisters : kOtherRegisters), kMostRegisters);
  const int64_t by_registers = std::max<int64_t>(kRegisters / (int64_t(registers) * c.threads()),
                                                 c.resident(is_lean(p, kernel) && element_bytes(p.dtype) == 2));
  const int64_t by_shared = caps.shared_bytes_multiprocessor / (shared_bytes + kReservedShared);
  return int(std::max<int64_t>(1, std::min({by_registers, by_shared, int64_t(kMaxCtas)})));
}

FusedFeatures fused_features(const Problem& p, const GpuKernel& kernel, const Geometry& g, const SharedLayout& l,
                             const GpuCaps& caps) {
  if (is_sm90a(kernel)) return sm90a_features(kernel, g, caps);
  return features_of(Counter(p, kernel, g, l), g, kernel, caps, ctas_per_multiprocessor(p, kernel, caps, l.bytes));
}

namespace {

// Fills in everything of a plan but its times. Returns the features that they are computed from.
FusedFeatures count(Plan& plan, const Problem& p, const GpuKernel& kernel, const GpuCaps& caps, const SharedLayout& l) {
  const Geometry& g = plan.geometry;
  plan.shared_bytes = l.bytes;
  plan.threads = threads_of(kernel);
  plan.bytes = block_bytes(p);
  if (is_sm90a(kernel)) {
    plan.ctas = sm90a_ctas(g, caps);
    plan.waves = double(sm90a_turns(kernel, g, caps));
    plan.flops = sm90a_flops(kernel, g);
    return sm90a_features(kernel, g, caps);
  }
  const int64_t together = ctas_per_multiprocessor(p, kernel, caps, l.bytes), sms = caps.multiprocessors;
  const Counter counter(p, kernel, g, l);
  plan.ctas = kernel.shape.persistent ? std::min(g.tiles(), sms * together) : g.ctas();
  plan.waves = double(g.ctas()) / double(sms * together);
  plan.flops = 2 * double(g.ctas()) * (counter.multiply_adds() + counter.depthwise_sums());
  // Neighbours' halos and further passes over the input come out of L2, as long as the tiles at work fit into it.
  const double tile_bytes = double(g.halo()) * g.s * element_bytes(p.dtype);
  const double at_work = double(std::min(plan.ctas, sms * together)) * tile_bytes;
  if (l.r1_passes > 1 && at_work > caps.l2_bytes / 2.0) plan.bytes += double(g.ctas()) * tile_bytes * (l.r1_passes - 1);
  return features_of(counter, g, kernel, caps, together);
}

}  // namespace

void cost_fused(Plan& plan, const Problem& p, const GpuKernel& kernel, const GpuCaps& caps, const SharedLayout& l) {
  const FusedFeatures features = count(plan, p, kernel, caps, l);
  const FusedConstants& constants = constants_of(p, kernel);
  double clocks = 0;
  for (int i = 0; i < kFusedFeatures; ++i) clocks += features[i] * constants.clocks[i];
  const double memory = plan.bytes / (caps.memory_bytes_per_second * kMemoryShare);
  const double peak = plan.flops / (std::max(peak_flops(p, kernel, caps), caps.fp32_flops) * kProductShare);
  const double gpu = kFusedLaunch + std::max({clocks / clock_of(caps), memory, peak});
  plan.gpu_seconds = gpu;
  plan.predicted_seconds = std::max(gpu, kFusedCall);
}

}  // namespace lowrank_ops
