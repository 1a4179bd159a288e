// The planner's answer: how a problem is to be run, on a CPU or a GPU.
//
// Words used here. A *plan* is one way to run a problem, with its costs. A *candidate* is a plan that the planner
// compares with others. A *decision* is the chosen plan, the other candidates, and the reasons against them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "plan/geometry.h"
#include "plan/patches.h"
#include "plan/problem.h"

namespace lowrank_ops {

enum class Policy { kAuto, kFused, kChain, kMeasure };
enum class Path { kFused, kChain };  // a kernel of ours, or the chain of torch's ops

// How the CPU's fused kernel divides a problem. `scratch_bytes` are per thread, in a team too: intermediates live there
// and nowhere else.
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
  int gpu_kernel = -1;  // index into gpu_kernels() (gpu/planner.h), for a GPU's fused plans
  Geometry geometry;    // how that kernel cuts the problem
  int64_t shared_bytes = 0, threads = 0, ctas = 0;
  double waves = 0;                // rounds that the GPU needs for all CTAs (persistent ones: for all tiles)
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

const char* name_of(Op op);
const char* name_of(DType dtype);
const char* name_of(Policy policy);
const char* name_of(Path path);
std::string by_policy(Policy policy);  // the reason: the policy is "..."

// For devices without kernels of ours: always the chain. `why` there are none becomes the reason.
Decision plan_other(const Problem& problem, const std::string& why, Policy policy);

}  // namespace lowrank_ops
