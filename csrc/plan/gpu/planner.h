// The planner's side of GPUs: which fused CUDA kernel runs a problem on a GPU, or the chain of library ops. Plain
// C++17: no torch, no CUDA headers.
//
// The words used here and in the files beside this one:
//   cut        how one kernel divides a problem: tile, slots of the ring buffer, splits, clusters (a Geometry)
//   plan       one way to run a problem (a kernel with its cut, or the chain), with its predicted time
//   candidate  a kernel under consideration: its plan, or the reason why it cannot run
//   decision   the plan that is taken, the other plans, and a reason against each kernel that is not taken
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "plan/plan.h"

namespace lowrank_ops {

// A GPU as the planner sees it: read from the driver for the present device, or taken from the list of named GPUs
// (known_gpus.cpp).
struct GpuCaps {
  std::string name;
  int architecture = 0;  // 80, 86, 90, ...: compute capability x 10
  int multiprocessors = 0;
  int64_t shared_bytes_cta = 0;  // dynamic shared memory that one CTA can be given
  int64_t shared_bytes_multiprocessor = 0;
  int64_t l2_bytes = 0;
  double memory_bytes_per_second = 0;
  // Operations per second, without sparsity. fp32 and fp64: FMA units. tf32 and fp16: tensor cores through mma.sync,
  // which our sm80 kernels use. library_*: tensor cores at their best, which libraries reach.
  double fp32_flops = 0, fp64_flops = 0, tf32_flops = 0, fp16_flops = 0;
  double library_tf32_flops = 0, library_fp16_flops = 0;
  // Architectures that this build has machine code for ({80, 86, ...}) and the architecture of its PTX (0: no PTX).
  // Both empty: not known, so every architecture counts as built for (plans for GPUs that are not present).
  std::vector<int> built_for;
  int built_ptx = 0;
  bool tensor_maps = true;  // whether the driver can make tensor maps (cuda/kernels/tensor_map.cuh)
};

const std::vector<GpuCaps>& named_gpus();          // A100, RTX 3090, RTX 4090, H100, H200, B200
const GpuCaps* find_gpu(const std::string& name);  // case and spaces do not count; nullptr: unknown
// Fills in the FLOP rates of a GPU that was read from the driver: those of the named GPU of the same kind, which gives
// the bandwidth too, or else rates computed from its architecture and its clock in Hz.
void fill_rates(GpuCaps& caps, double clock);

// One kernel that can be launched: one configuration of a family, for one op.
struct GpuKernel {
  const char* name;  // tucker_conv2d_sm80_128x64: op, family, pixels x columns
  Op op;
  Family family;
  int config;  // index into the family's configurations (geometry.h)
  Config shape;
  int first_architecture;   // oldest architecture that runs it; sm90a kernels run on this one alone
  const char* verified_on;  // the GPUs on which all of its tests have run, separated by ", "; or ""
  const char* measured_on;  // the GPUs on which its times were measured, or ""
};
// Whether a GPU of verified_on has the architecture of `caps`. Otherwise the kernel is checked before its first use.
bool ran_right_on(const GpuKernel& kernel, const GpuCaps& caps);
const std::vector<GpuKernel>& gpu_kernels();           // the lines of kernel_table.inc
int gpu_kernel_index(const std::string& kernel_name);  // -1: unknown

// The widest copies in bytes: those that the problem names, or those that its sizes allow for dense tensors.
struct CopyWidths {
  int64_t input, factor, output;
};
CopyWidths copy_widths(const Problem& problem);

// Whether the chain of library ops runs CP's two depthwise stages as one convolution, whose window is the product of
// the two factors. Speed of the one convolution over the two, on an H200 in bfloat16 (benchmarks/results/
// h200_depthwise.jsonl; larger images gain more): in channels_last 2.5 to 30 for 3x3, 2 to 19 for 5x5, 1.2 to 12 for
// 7x7, 1.3 for 2x3; in NCHW 2 to 3.3 for 3x3, 1.5 to 2.4 for 5x5, 0.8 to 1.3 for 7x7. Computing the product adds 2 us.
// A factor of one tap only scales the other factor.
constexpr bool merges_depthwise(const Problem& p) {
  const int64_t most_taps = p.layout == Layout::kChannelsLast ? 49 : 25;
  return p.op == Op::kCP && (p.kh == 1 || p.kw == 1 || p.kh * p.kw <= most_taps);
}

// The problem as our kernels see it: those of prepared factors have padded ranks. The chain reads the ordinary factors.
Problem kernel_problem(Problem problem);

// Cuts `problem` for `kernel`: the tile, slots, splits and clusters of the lowest predicted time, or a reason why it
// cannot run.
struct GpuCandidate {
  Plan plan;
  std::string reason;    // empty: it can run
  bool no_code = false;  // the reason is that this build has no code for the GPU
};
GpuCandidate plan_kernel(const Problem& problem, const GpuKernel& kernel, const GpuCaps& caps);
// Why no kernel can take these sizes; "": the sizes are no obstacle. Kernels compute coordinates, channels and depths
// in 32 bits, offsets into tensors in 64.
std::string size_reason(const Problem& problem);
// The cut with the given tile (images, height, width), slots of the ring buffer (`stages`), splits and CTAs per
// cluster.
Geometry geometry_of(const Problem& problem, int tile_n, int tile_h, int tile_w, int stages, int splits,
                     int cluster = 1);
const char* name_of(Family family);
bool is_simt(const GpuKernel& kernel);  // by plain multiply-adds
int threads_of(const GpuKernel& kernel);
// Whether the launcher takes the kernel's lean variant (cuda/kernels/common_case.h): 16-byte vectors everywhere.
bool is_lean(const Problem& problem, const GpuKernel& kernel);
SharedLayout layout_of(const Problem& problem, const GpuKernel& kernel, const Geometry& geometry);

// The architecture on which the cost model's constants were measured; the predictions for others are scaled.
constexpr int kMeasuredArchitecture = 90;  // NVIDIA H200 (cost_constants.inc)
bool is_measured(const GpuCaps& caps);
// Whether a kernel's times for such problems were measured on the architecture of `caps`. "auto" takes the prediction
// for any other kernel for `kUnmeasuredMargin` times as long.
bool is_measured(const GpuKernel& kernel, const Problem& problem, const GpuCaps& caps);
constexpr double kUnmeasuredMargin = 1.5;

// Kernels that must or must not run, whatever the policy says.
struct GpuRestrictions {
  int only = -1;                     // for tests: index of the kernel that its op must run wherever it can; -1: none
  std::vector<std::string> refused;  // per kernel: why it must not run here ("": it may); empty: all may
};
// Compares every kernel of the op with the chain of library ops. `chosen` and `others` can all run; `others` has the
// lowest predicted time first. Under kMeasure `chosen` is what kAuto would take, and the caller times them all.
Decision plan_gpu(const Problem& problem, const GpuCaps& caps, Policy policy, const GpuRestrictions& restrictions = {});

// A decision that all calls of one problem share.
struct SharedDecision : Decision {
  explicit SharedDecision(Decision decision) : Decision(std::move(decision)) {}
  // For decisions with chain_in_graphs: whether the chain has already run outside of a CUDA graph.
  mutable std::atomic<bool> chain_ran{false};
};
// plan_gpu behind a cache, for every call of an op. The key holds the index `device` instead of `caps`. Thread-safe.
std::shared_ptr<const SharedDecision> cached_plan_gpu(const Problem& problem, const GpuCaps& caps, int device,
                                                      Policy policy);
int64_t gpu_plans_made();  // how many searches for a plan cached_plan_gpu has made
// Restricts all later plans of this process to one kernel per op; "" lifts the restriction. False: there is no such
// kernel, and nothing changes.
bool force_gpu_kernel(const std::string& name);
std::string forced_gpu_kernel();
void refuse_gpu_kernel(int device, int kernel, const std::string& reason);
GpuRestrictions gpu_restrictions(int device);

}  // namespace lowrank_ops
