// The cost model for GPUs: predicted seconds of a fused kernel and of the chain of library ops. Plain C++17.
//
// The fused kernels wait for their own instructions and barriers more than for memory (docs/kernels.md): a
// multiprocessor holds few warps, and each takes 5 to 9 clocks per instruction. So the model counts the work of one
// warp of one CTA (chunks, copies, products, ...), weights each item with its clocks, and multiplies by the rounds of
// CTAs that a multiprocessor goes through. The times that device memory and the tensor cores need at their best rates
// are lower bounds.
//
// The constants in cost_constants.inc are fitted by benchmarks/studies/fit_gpu_cost.py to committed measurements on the
// GPU that the file names. On other GPUs they are scaled by clock, multiprocessors and bandwidth, which nobody has
// checked: "auto" assumes longer times there (kUnmeasuredMargin in planner.h). The policy "measure" does not need them.
//
// A predicted time is the longer of the GPU's time and the CPU's, which has to launch every kernel: so much a call
// takes in a network of such layers. Launches that a CUDA graph replays cost the CPU no time
// (Decision::chain_in_graphs).
#pragma once

#include <array>

#include "plan/gpu/planner.h"

namespace lowrank_ops {

// The features of a fused kernel: the work of one warp of a CTA, times the rounds of the busiest multiprocessor.
//   ctas       1 per round: computing offsets, waiting for the first chunk, the last stores
//   chunks     steps of the ring buffer: a barrier, finding the next chunk
//   copies     asynchronous copies, per thread
//   loads      elements that are copied through registers, per thread
//   products   steps of matrix products: mma.sync per warp, or multiply-adds per thread / 64
//   stores     values of the hidden tiles that are rounded and stored, per thread
//   depthwise  multiply-adds of CP's depthwise stages, per thread; windows other than three taps of stride 1 count more
//   outputs    16-byte vectors of the output, per thread (or the elements of one, where they are written one by one)
//   waits      chunks / (slots - 1): the part of a chunk's way through L2 that is left when the chunk is needed
enum FusedFeature { kCtas, kChunks, kCopies, kLoads, kProducts, kStores, kDepthwise, kOutputs, kWaits, kFusedFeatures };
using FusedFeatures = std::array<double, kFusedFeatures>;

// The features of the chain of library calls. Counts:
//   kernels          kernels that the library starts one after the other
//   transposes       calls around which the library converts from NCHW to its own layout and back
// Seconds that these would take at the GPU's best rates:
//   cold_bytes       bytes read from and written to device memory
//   warm_bytes       bytes from and to L2: the output of the kernel before, where it fits
//   products         matrix products, in whole tiles, on those multiprocessors that get a tile
//   depthwise        multiply-adds of depthwise convolutions
//   transposed_bytes bytes read and written by the conversions of layout
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

// One constant per feature. Fused: clocks of a multiprocessor per item. Chain: seconds per kernel or transpose, and a
// factor on each of the features in seconds.
struct FusedConstants {
  double clocks[kFusedFeatures];
};
struct ChainConstants {
  double factors[kChainFeatures];
};

constexpr double kLibraryCall = 17e-6;  // CPU time per library call of the chain (the host of an H200)
// GPU time of multiplying CP's two depthwise factors (merges_depthwise): on an H200 the op took 4.0 to 4.6 us longer
// than the library's calls alone in ten layers of eleven, 17 us in one (sets lean_bf16 and lean_nchw of h200.csv).
constexpr double kFactorProduct = 4.3e-6;

FusedFeatures fused_features(const Problem& problem, const GpuKernel& kernel, const Geometry& geometry,
                             const SharedLayout& layout, const GpuCaps& caps);
ChainFeatures chain_features(const Problem& problem, const GpuCaps& caps);

double clock_of(const GpuCaps& caps);
constexpr int kLargestCtas = 32;  // CTAs per multiprocessor on the architecture that holds most of them
int ctas_per_multiprocessor(const Problem& problem, const GpuKernel& kernel, const GpuCaps& caps, int64_t shared_bytes);

// Fills in the counts and the predicted time of a plan whose cut (plan.geometry) is set.
void cost_fused(Plan& plan, const Problem& problem, const GpuKernel& kernel, const GpuCaps& caps,
                const SharedLayout& layout);
Plan chain_plan(const Problem& problem, const GpuCaps& caps);

}  // namespace lowrank_ops
