// The cost model for GPUs: predicted seconds of a fused kernel and of the chain of library ops. Plain C++17.
//
// A fused kernel of today waits for its own instructions and barriers more than for memory (docs/kernels.md): a
// multiprocessor holds few warps, and each takes 5 to 9 clocks per instruction. So the model counts what a warp of one
// CTA does (chunks, copies, products, ...), in clocks per item, times the rounds of CTAs that a multiprocessor goes
// through. Neither device memory nor the tensor cores can be beaten: their times are lower bounds.
//
// The constants are fitted by benchmarks/studies/fit_gpu_cost.py from committed measurements and stand in
// gpu_cost_constants.inc, with the GPU they come from. On other GPUs they are scaled by clock, multiprocessors and
// bandwidth, which nobody has checked: "auto" asks for a margin there (gpu.cpp). The policy "measure" does not need
// them.
//
// A prediction is the longer of the GPU's time and of the CPU's, which has to launch every kernel: what a call takes in
// a network of such layers. Launches that a CUDA graph replays cost no time of the CPU (Decision::chain_in_graphs).
#pragma once

#include <array>

#include "plan/gpu/planner.h"

namespace lowrank_ops {

// What a warp of a CTA does, and how often the busiest multiprocessor does it.
//   ctas       once: offsets, the first chunk's way, the last stores
//   chunks     steps of the ring buffer: a barrier, the choice of the next chunk
//   copies     asynchronous copies of a thread
//   loads      elements of a thread that no asynchronous copy takes
//   products   steps of matrix products: mma.sync of a warp, or multiply-adds of a thread / 64
//   stores     values of the hidden tiles that a thread rounds and stores
//   depthwise  multiply-adds of CP's middle, of a thread; windows other than three taps of stride 1 count more
//   outputs    vectors of 16 bytes (or the elements of one, where they are written one by one) of a thread
//   waits      chunks / (stages - 1): what is left of a chunk's way through L2 when it is wanted
enum FusedFeature { kCtas, kChunks, kCopies, kLoads, kProducts, kStores, kDepthwise, kOutputs, kWaits, kFusedFeatures };
using FusedFeatures = std::array<double, kFusedFeatures>;

// What the chain's library calls do.
//   kernels          of the library, started one after the other
//   transposes       those of them around which it goes from NCHW to its own layout and back
// and the seconds that these would take at the GPU's best rates:
//   cold_bytes       read from and written to device memory
//   warm_bytes       from and to L2: what the kernel before has just written, where that fits
//   products         the matrix products, in whole tiles, by those multiprocessors that get one
//   depthwise        the multiply-adds of depthwise convolutions
//   transposed_bytes read and written between NCHW and the library's own layout
enum ChainFeature {
  kKernels,
  kTransposes,
  kColdBytes,
  kWarmBytes,
  kChainProducts,
  kChainDepthwise,
  kTransposedBytes,
  kChainFeatures
};
using ChainFeatures = std::array<double, kChainFeatures>;

// Constants for the features: clocks of a multiprocessor, and factors of the seconds (of one kernel or transpose:
// seconds).
struct FusedConstants {
  double clocks[kFusedFeatures];
};
struct ChainConstants {
  double factors[kChainFeatures];
};

constexpr double kLibraryCall = 17e-6;  // of the CPU, for each library call of the chain (the host of an H200)
// Of the GPU, for CP's factors multiplied out (merges_depthwise): on an H200 the op took 4.0 to 4.6 us longer than the
// library's calls alone in ten layers of eleven (h200_lean_bf16.json, h200_lean_nchw.json; once 17).
constexpr double kFactorProduct = 4.3e-6;

FusedFeatures fused_features(const Problem& problem, const GpuKernel& kernel, const Geometry& geometry,
                             const SharedLayout& layout, const GpuCaps& caps);
ChainFeatures chain_features(const Problem& problem, const GpuCaps& caps);

double clock_of(const GpuCaps& caps);
int ctas_per_multiprocessor(const Problem& problem, const GpuKernel& kernel, const GpuCaps& caps, int64_t shared_bytes);

// Fills in the counts and the predicted time of a plan whose geometry stands.
void cost_fused(Plan& plan, const Problem& problem, const GpuKernel& kernel, const GpuCaps& caps,
                const SharedLayout& layout);
Plan chain_plan(const Problem& problem, const GpuCaps& caps);

}  // namespace lowrank_ops
