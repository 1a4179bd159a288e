// How a problem is to be run on a CPU. Plain C++17: no torch, no CUDA headers, so that every machine's plans can be
// tested on any machine.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "plan/axis.h"
#include "plan/counts.h"
#include "plan/plan.h"

namespace lowrank_ops {

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

// Elements from one row of a streamed linear layer's tile to the next: no power of two, because then all rows would
// fall into the same few lines of L1.
constexpr int64_t streamed_stride(int64_t columns) {
  return round_up(columns, int64_t(16)) + 16;
}
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
}  // namespace lowrank_ops
