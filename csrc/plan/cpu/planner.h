// The planner finds how a problem is to be run on a machine. Plain C++17: no torch, no CUDA headers, so that every
// machine's plans can be tested on any machine.
//
// Words used here. A *plan* is one way to run a problem, with its costs. A *candidate* is a plan that the planner
// compares with others. A *decision* is the chosen plan, the other candidates, and the reasons against them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "plan/cpu/patches.h"
#include "plan/gpu/geometry.h"
#include "plan/problem.h"

namespace lowrank_ops {

enum class Policy { kAuto, kFused, kChain, kMeasure };
enum class Path { kFused, kChain };  // a kernel of ours, or the chain of torch's ops

// Whether the threads of a call share the stages of a tile.
enum class Teams { kAuto, kAlways, kNever };

// All that the planner knows about a CPU. Read by csrc/cpu/isa.cpp; nothing is timed.
struct CpuCaps {
  std::string isa = "generic";  // generic, avx2, avx512, avx512bf16, amx: the kernels that run here
  std::string name;             // the CPU's own name, for the reader
  int64_t l2_bytes = 1 << 20;   // per core
  int64_t l3_bytes = 32 << 20;  // shared by several cores; 0: none
  int64_t threads = 1;          // at::get_num_threads() at the time of the call
  bool bfloat16_dot = false;    // bf16 products without conversion (avx512_bf16 or AMX)
  bool amx = false;
  bool winograd_auto = true;            // Winograd's transforms are used where they are predicted to be faster;
  Winograd winograd = Winograd::kNone;  // otherwise this one, wherever it is possible
  Teams teams = Teams::kAuto;
};

// The most scratch memory that a thread keeps from call to call (cpu/memory.h). A larger tile would be fresh memory at
// every call, which is far too slow: the chain runs instead.
constexpr int64_t kMostKeptBytes = 16 << 20;

// How the first stage runs: as a product with packed panels, or, for a hidden rank of one, as sums over the channels of
// a pixel (linear: over a row; cpu/channel_sum.h).
enum class FirstStage { kPanels, kDots, kPlanes };
FirstStage first_stage(const Problem& problem);
// How Tucker's core runs. kPanels: by Winograd's transforms or as a product with packed panels. One output channel
// fills no vector of a panel; kDots: as dot products along its taps; kPlanes, for one hidden channel: as sums with
// vectors along the pixels.
enum class CoreStage { kPanels, kDots, kPlanes };
// `pairs`: elements are bf16, in pairs along the depth (in_pairs).
CoreStage core_stage(const Problem& problem, Winograd winograd, bool pairs);
// Whether the last stage scales a plane of one hidden channel into each plane of the output, without panels.
bool spreads_plane(const Problem& problem, Winograd winograd, bool pairs);
inline bool in_pairs(const Problem& problem, const CpuCaps& caps) {
  return problem.dtype == DType::kBFloat16 && caps.bfloat16_dot;
}

// How the fused kernel divides a problem. `scratch_bytes` are per thread, in a team too: intermediates live there and
// nowhere else.
struct CpuTile {
  int64_t rows = 1;        // output rows (linear: rows of the input) that go through all stages together
  int64_t columns = 1;     // output columns of a task
  int64_t strips = 1;      // tasks along the height of an image
  int64_t team = 1;        // threads that share every stage of a task; 1: each thread has tasks of its own
  int64_t tasks_each = 1;  // the fewest tasks that are worth waking a thread
  bool unpacked = false;   // linear with few rows, CP with few pixels: dot products with the unpacked weights
  int64_t depth = 0;       // linear: how much of a weight's depth is packed at a time; 0: all of it
  Winograd winograd = Winograd::kNone;  // Tucker's core; tiles begin at multiples of its patch
  bool prepared = false;                // the weights were packed before the call
  bool far = false;                     // input and output exceed L2: they are prefetched
  bool spreads_prefetches = false;      // prefetches are also spread over a step (cpu/prefetcher.h)
  int64_t scratch_bytes = 0;
};

struct Plan {
  Path path = Path::kChain;
  std::string kernel;  // which code runs
  CpuTile tile;
  int gpu_kernel = -1;  // index into gpu_kernels() (gpu.h), for a GPU's fused plans
  Geometry geometry;    // how that kernel cuts the problem
  int64_t shared_bytes = 0, threads = 0, ctas = 0;
  double waves = 0;                // rounds that the GPU needs for all CTAs
  double flops = 0;                // multiplications and additions of the block, halo included
  double bytes = 0;                // that must move between memory and the core
  double predicted_seconds = 0;    // by the cost model, on one thread; 0 where it has no figures
  double gpu_seconds = 0;          // the part of these that the GPU works: without the CPU's time for launches
  std::vector<double> features;    // the counts that the prediction was computed from (cost.h)
  std::vector<std::string> notes;  // for the reader of the plan
};

// A candidate that was not chosen: its kernel and the reason, for the reader.
struct Rejection {
  std::string kernel, reason;
  bool no_code = false;  // the reason is that this build has no code for the GPU
};

struct Decision {
  Plan chosen;
  std::vector<Plan> others;
  std::vector<Rejection> rejections;
  // GPUs: `chosen` is fused because the CPU needs longer to launch the chain. In a CUDA graph, whose replays need no
  // such launches, the chain is predicted to be faster.
  bool chain_in_graphs = false;
};

// One axis of a convolution on its lattice: the rows (columns) that some tap reads. Position z stands for the input
// coordinate z * step - padding; output o reads the positions o * stride + tap * dilation. `stride` and `dilation` are
// in units of `step`.
struct Axis {
  int64_t in, out, kernel, step, stride, dilation, padding;

  Axis(int64_t in, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation);
  int64_t span(int64_t outputs) const { return (outputs - 1) * stride + (kernel - 1) * dilation + 1; }
  int64_t coordinate(int64_t z) const { return z * step - padding; }
  int64_t first_inside() const { return (padding + step - 1) / step; }
  int64_t end_inside() const { return (in - 1 + padding) / step + 1; }

  // Those taps [begin, end) that lie in [inside_begin, inside_end), of an output whose first tap is at position z.
  struct Taps {
    int64_t begin, end;
    bool operator==(const Taps& other) const { return begin == other.begin && end == other.end; }
  };
  Taps taps_inside(int64_t z, int64_t inside_begin, int64_t inside_end) const {
    const int64_t before = std::max<int64_t>(inside_begin - z, 0), after = std::max<int64_t>(inside_end - z, 0);
    const int64_t end = std::min(ceil_div(after, dilation), kernel);
    return {std::min(ceil_div(before, dilation), end), end};
  }
};

// The two axes of a convolution.
inline Axis row_axis(const Problem& p) {
  return Axis(p.h, p.kh, p.stride[0], p.padding[0], p.dilation[0]);
}
inline Axis column_axis(const Problem& p) {
  return Axis(p.w, p.kw, p.stride[1], p.padding[1], p.dilation[1]);
}

int64_t element_bytes(DType dtype);
// Elements from one row of a streamed linear layer's tile to the next: no power of two, because then all rows would
// fall into the same few lines of L1.
constexpr int64_t streamed_stride(int64_t columns) {
  return round_up(columns, int64_t(16)) + 16;
}
const char* name_of(Op op);
const char* name_of(DType dtype);
const char* name_of(Policy policy);
const char* name_of(Path path);
std::string by_policy(Policy policy);  // the reason: the policy is "..."

// `prepared`: the weights were packed before the call, so that packing costs nothing.
CpuTile cpu_tile(const Problem& problem, const CpuCaps& caps, bool prepared = false);

// Whether the core of this block can be computed by this transform, for images of some size.
bool winograd_fits(const Problem& problem, const CpuCaps& caps, Winograd winograd);

// The plan of a call, without the texts of a decision; plan_cpu returns the same with reasons.
struct CpuPlan {
  CpuTile tile;                // of the fused kernel
  bool chain = false;          // the chain is to run
  bool other_possible = true;  // false: the other path is no candidate, however fast it is
  CpuTile one_thread_tile;     // the tile that the predictions are made for (cost.h)
  double fused_seconds = 0, chain_seconds = 0;
};
CpuPlan make_cpu_plan(const Problem& problem, const CpuCaps& caps, Policy policy, bool prepared = false);
// make_cpu_plan behind a cache, for every call of an op. Thread-safe.
std::shared_ptr<const CpuPlan> cached_cpu_plan(const Problem& problem, const CpuCaps& caps, Policy policy,
                                               bool prepared);
int64_t cpu_plans_made();  // how often cached_cpu_plan has had to plan
Decision plan_cpu(const Problem& problem, const CpuCaps& caps, Policy policy, bool prepared = false);
// For devices without kernels of ours: always the chain. `why` there are none becomes the reason.
Decision plan_other(const Problem& problem, const std::string& why, Policy policy);

}  // namespace lowrank_ops
