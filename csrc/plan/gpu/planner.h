// What the planner knows of GPUs and of the fused CUDA kernels. Plain C++17: no torch, no CUDA headers.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "plan/cpu/planner.h"
#include "plan/gpu/geometry.h"

namespace lowrank_ops {

// A GPU as the planner sees it: read from the driver for the present device, or from the list of named GPUs (gpus.cpp).
struct GpuCaps {
  std::string name;
  int architecture = 0;  // 80, 86, 90, ...: compute capability x 10
  int multiprocessors = 0;
  int64_t shared_bytes_cta = 0;  // dynamic shared memory that a CTA may ask for
  int64_t shared_bytes_multiprocessor = 0;
  int64_t l2_bytes = 0;
  double memory_bytes_per_second = 0;
  // A second, dense: of the FMA units, of mma.sync (our kernels), of the tensor cores at their best (libraries).
  double fp32_flops = 0, fp64_flops = 0, tf32_flops = 0, fp16_flops = 0;
  double library_tf32_flops = 0, library_fp16_flops = 0;
  // Architectures that this build has code for ({80, 86, ...}), and that of its PTX (0: none); empty: not known, taken
  // as everything (plans for GPUs that are not there).
  std::vector<int> built_for;
  int built_ptx = 0;
  bool tensor_maps = true;  // whether the driver can make them (kernels/tensor_map.cuh)
};

const std::vector<GpuCaps>& named_gpus();          // A100, RTX 3090, RTX 4090, H100, H200, B200
const GpuCaps* find_gpu(const std::string& name);  // by name, case and spaces ignored; nullptr: unknown
// Fills in the FLOP rates of a GPU read from the driver: those of its named kind (and its bandwidth), or by
// architecture and clock in Hz.
void fill_rates(GpuCaps& caps, double clock);

// One kernel that can be launched: a family's configuration for one op.
struct GpuKernel {
  const char* name;  // tucker_conv2d_sm80_128x64: op, family, pixels x columns
  Op op;
  Family family;
  int config;  // index into the family's configurations (geometry.h)
  Config shape;
  int first_architecture;   // runs from here on; sm90a on this one alone
  const char* verified_on;  // names of GPUs that have run all of its tests, separated by ", "; or ""
};
// Whether such a GPU has the architecture of this one. Otherwise the kernel is checked before its first use.
bool ran_right_on(const GpuKernel& kernel, const GpuCaps& caps);
const std::vector<GpuKernel>& gpu_kernels();           // the table, kernel_table.inc
int gpu_kernel_index(const std::string& kernel_name);  // -1: unknown

// The widest copies in bytes, as the problem says, or as its sizes allow for dense tensors.
struct CopyWidths {
  int64_t input, factor, output;
};
CopyWidths copy_widths(const Problem& problem);

// Whether the chain of library ops runs CP's two depthwise stages as one convolution with their product as its window.
// On an H200 in bfloat16 (benchmarks/results/h200_depthwise.jsonl; the better the larger the image) that was in
// channels_last 2.5 to 30 times as fast for 3x3, 2 to 19 for 5x5, 1.2 to 12 for 7x7, 1.3 for 2x3; in NCHW 2 to 3.3 for
// 3x3, 1.5 to 2.4 for 5x5, 0.8 to 1.3 for 7x7. The product costs 2 us more. A factor of one tap only scales the other.
constexpr bool merges_depthwise(const Problem& p) {
  const int64_t most_taps = p.layout == Layout::kChannelsLast ? 49 : 25;
  return p.op == Op::kCP && (p.kh == 1 || p.kw == 1 || p.kh * p.kw <= most_taps);
}

// Cuts `problem` for `kernel`: the tile, stages and splits of lowest predicted time, or a reason why it cannot run.
struct GpuCandidate {
  Plan plan;
  std::string reason;    // empty: it can run
  bool no_code = false;  // the reason is that this build has no code for the GPU
};
GpuCandidate plan_kernel(const Problem& problem, const GpuKernel& kernel, const GpuCaps& caps);
// Why no kernel can take sizes like these, "": they can. Kernels compute coordinates, channels and depths in 32 bits
// (offsets into tensors in 64).
std::string size_reason(const Problem& problem);
// The same with a given cut, for tests that walk over tiles: tile_n, tile_h, tile_w, stages, splits.
Geometry geometry_of(const Problem& problem, int tile_n, int tile_h, int tile_w, int stages, int splits);
const char* name_of(Family family);
bool is_simt(const GpuKernel& kernel);  // by plain multiply-adds
int threads_of(const GpuKernel& kernel);
// Whether the launcher takes the kernel's lean variant (kernels/common_case.h): 16-byte vectors everywhere.
bool is_lean(const Problem& problem, const GpuKernel& kernel);
SharedLayout layout_of(const Problem& problem, const GpuKernel& kernel, const Geometry& geometry);

// Whether the cost model was fitted to measurements on a GPU of this architecture. On others "auto" takes a fused
// kernel only where it is predicted to be `kUnmeasuredMargin` times as fast as the chain.
constexpr int kMeasuredArchitecture = 90;  // NVIDIA H200 (gpu_cost_constants.inc)
constexpr double kUnmeasuredMargin = 1.5;
bool is_measured(const GpuCaps& caps);

// What narrows the choice, besides the policy.
struct GpuRestrictions {
  int only = -1;                     // index into gpu_kernels(): its op runs this kernel wherever it can, for tests
  std::vector<std::string> refused;  // by kernel, or empty: why it must not run on this GPU ("": it may)
};
// Every kernel of the op against the chain of library convs. `chosen` and `others` all can run, the lowest predicted
// time first; under kMeasure `chosen` is what kAuto would take, and the caller times them.
Decision plan_gpu(const Problem& problem, const GpuCaps& caps, Policy policy, const GpuRestrictions& restrictions = {});

// A decision that the calls of a problem share.
struct SharedDecision : Decision {
  explicit SharedDecision(Decision decision) : Decision(std::move(decision)) {}
  // Where the chain runs in CUDA graphs only (chain_in_graphs): whether it has run outside of one.
  mutable std::atomic<bool> chain_ran{false};
};
// plan_gpu behind a cache, for every call of an op: `device` stands for `caps` in its key. Thread-safe.
std::shared_ptr<const SharedDecision> cached_plan_gpu(const Problem& problem, const GpuCaps& caps, int device,
                                                      Policy policy);
int64_t gpu_plans_made();  // how often cached_plan_gpu has had to search
// Restrictions of all later plans of this process. Of an unknown kernel: false, and nothing changes; "" lifts it.
bool force_gpu_kernel(const std::string& name);
std::string forced_gpu_kernel();
void refuse_gpu_kernel(int device, int kernel, const std::string& reason);
GpuRestrictions gpu_restrictions(int device);

}  // namespace lowrank_ops
