// The planner: a problem and a machine in, a plan out, with the reasons against every candidate that was not taken.
// Plain C++17: no torch, no CUDA headers, so that every machine's plans can be tested on any machine.
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

// What the planner knows of a CPU. Read once at start (csrc/cpu/isa.cpp); nothing is timed.
struct CpuCaps {
  std::string isa = "generic";  // generic, avx2, avx512, avx512bf16, amx: the kernels that run here
  std::string name;             // the CPU's own name, for the reader
  int64_t l2_bytes = 1 << 20;   // a core's
  int64_t l3_bytes = 32 << 20;  // of all cores that share it; 0: none
  int64_t threads = 1;          // at::get_num_threads() at the time of the call
  bool bfloat16_dot = false;    // bf16 products without conversion (avx512_bf16 or AMX)
  bool amx = false;
  bool winograd_auto = true;            // Winograd's transform is used where it pays;
  Winograd winograd = Winograd::kNone;  // otherwise this one, wherever it can be used
  Teams teams = Teams::kAuto;
};

// Scratch memory that a thread keeps from call to call at most (cpu/memory.h). A tile that takes more would be fresh
// memory at every call, and far too slow to fill: the chain runs instead.
constexpr int64_t kMostKeptBytes = 16 << 20;

// How the first stage is run: a product with packed panels, or, for a hidden rank of one, sums over the channels of a
// pixel (of a linear layer: over a row; cpu/channel_sum.h).
enum class FirstStage { kPanels, kDots, kPlanes };
FirstStage first_stage(const Problem& problem);
// How Tucker's core is run: by Winograd's transform or a product with packed panels, or, as one output channel fills no
// vector, by dot products along its taps, or, with one hidden channel too, by sums with vectors along the pixels.
enum class CoreStage { kPanels, kDots, kPlanes };
// `pairs`: elements are bf16, in pairs along the depth.
CoreStage core_stage(const Problem& problem, Winograd winograd, bool pairs);
// Whether the last stage scales a plane of one channel into those of the output, instead of a product with panels.
bool spreads_plane(const Problem& problem, Winograd winograd, bool pairs);
inline bool in_pairs(const Problem& problem, const CpuCaps& caps) {
  return problem.dtype == DType::kBFloat16 && caps.bfloat16_dot;
}

// How the fused kernel cuts a problem. Scratch is a thread's (of a team: its share): intermediates live there and
// nowhere else.
struct CpuTile {
  int64_t rows = 1;        // output rows (linear: rows of the input) that go through all stages together
  int64_t columns = 1;     // output columns of a task
  int64_t strips = 1;      // tasks along the height of an image
  int64_t team = 1;        // threads that share every stage of a task; 1: each thread has tasks of its own
  int64_t tasks_each = 1;  // that a thread takes at least: fewer are not worth waking it
  bool unpacked = false;   // linear: few rows, CP: few pixels, dot products with the weights where they lie
  int64_t depth = 0;       // linear: so much of the depth of a weight is packed at a time; 0: all of it
  Winograd winograd = Winograd::kNone;  // Tucker's core; tiles begin at multiples of its patch
  bool prepared = false;                // the weights were packed before the call
  bool far = false;                     // input and output are beyond L2: asked for ahead of their use,
  bool ahead = false;  // and through all of a step, as what a step touches of them fits L2 beside the tile
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
  double predicted_seconds = 0;    // of the cost model, on one thread; 0 where it has no figures
  double gpu_seconds = 0;          // of these, on a GPU: without the time that the CPU takes to launch the kernels
  std::vector<double> features;    // what the prediction was made of (cost.h)
  std::vector<std::string> notes;  // what the reader of a plan should know of it
};

// A candidate that does not run: its kernel, and why, for the reader.
struct Rejection {
  std::string kernel, reason;
  bool no_code = false;  // because this build was compiled without code for the GPU
};

struct Decision {
  Plan chosen;
  std::vector<Plan> others;
  std::vector<Rejection> rejections;
  // GPUs: `chosen` is fused because launching the chain takes the CPU longer; in a CUDA graph, whose replays cost it
  // nothing, the chain is predicted to be faster.
  bool chain_in_graphs = false;
};

// One axis of a convolution on the lattice of rows (columns) that some tap needs: position z stands for input
// coordinate z * step - padding, and output o reads z = o * stride + tap * dilation, both in units of `step`.
struct Axis {
  int64_t in, out, kernel, step, stride, dilation, padding;

  Axis(int64_t in, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation);
  int64_t span(int64_t outputs) const { return (outputs - 1) * stride + (kernel - 1) * dilation + 1; }
  int64_t coordinate(int64_t z) const { return z * step - padding; }
  int64_t first_inside() const { return (padding + step - 1) / step; }
  int64_t end_inside() const { return (in - 1 + padding) / step + 1; }

  // The taps [begin, end) of an output whose first tap is at position z, that lie in [inside_begin, inside_end).
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
// Columns from one row of a streamed linear layer's tile to the next: no power of two, whose rows would all fall into
// the same few lines of L1.
constexpr int64_t streamed_stride(int64_t columns) {
  return round_up(columns, int64_t(16)) + 16;
}
const char* name_of(Op op);
const char* name_of(DType dtype);
const char* name_of(Policy policy);
const char* name_of(Path path);
std::string by_policy(Policy policy);  // the reason: the policy is "..."

// `prepared`: the weights were packed before the call, so that this costs nothing.
CpuTile cpu_tile(const Problem& problem, const CpuCaps& caps, bool prepared = false);

// Whether the core of this block can be run so, for images of some size.
bool winograd_fits(const Problem& problem, const CpuCaps& caps, Winograd winograd);

// What a call needs of a decision; plan_cpu tells the same with its reasons.
struct CpuChoice {
  CpuTile tile;                // of the fused kernel
  bool chain = false;          // the chain is to run
  bool other_possible = true;  // false: the path not taken is no candidate, whatever it would take
  CpuTile one_thread_tile;     // what the prediction is made for (cost.h)
  double fused_seconds = 0, chain_seconds = 0;
};
CpuChoice choose_cpu(const Problem& problem, const CpuCaps& caps, Policy policy, bool prepared = false);
// choose_cpu behind a cache, for every call of an op. Thread-safe.
std::shared_ptr<const CpuChoice> cached_choose_cpu(const Problem& problem, const CpuCaps& caps, Policy policy,
                                                   bool prepared);
int64_t cpu_plans_made();  // how often cached_choose_cpu has had to plan
Decision plan_cpu(const Problem& problem, const CpuCaps& caps, Policy policy, bool prepared = false);
// Where there are no kernels of ours: always the chain, `why` there are none, and what becomes of the policy.
Decision plan_other(const Problem& problem, const std::string& why, Policy policy);

}  // namespace lowrank_ops
