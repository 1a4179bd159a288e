// The CPU's cost model: FLOPs and predicted seconds of a block, fused and as a chain. Plain C++17.
//
// A prediction is a sum of features (counts that follow from a problem, features.cpp) times constants in nanoseconds.
// benchmarks/studies/fit_cost.py fits the constants to measured times of the networks' layers and of random blocks, per
// op, dtype, layout and class of instruction sets, and separately for Tucker blocks with a rank of one. Classes differ,
// because the times of our kernels relative to oneDNN's depend on the number of lanes. Only the ratio of the two
// predictions decides, so the constants hold on other CPUs of a class better than seconds would; where they do not, the
// policy "measure" does not need them. cost_constants.inc names the machine of the measurements.
#pragma once

#include <array>

#include "plan/counts.h"
#include "plan/cpu/planner.h"

namespace lowrank_ops {

double fused_flops(const Problem& problem, const CpuTile& tile);  // with the halo that strips and columns recompute
// Multiply-adds of one task: output rows [first, last) of a tile's columns of one image, halo included.
double strip_multiply_adds(const Problem& problem, const CpuTile& tile, int64_t first, int64_t last);

double fused_products(const Problem& problem, const CpuTile& tile);  // fused multiply-adds without the next two counts

double winograd_sums(const Problem& problem, Winograd winograd);  // additions of the transforms of an image

// The features of one way to run a problem, on one thread. Predictions do not depend on the number of threads, so that
// it cannot change the path of a result, and with it the bits.
constexpr int kFeatures = 13;
using Features = std::array<double, kFeatures>;
constexpr const char* kFusedFeatureNames[kFeatures] = {
    "calls",        // 1
    "products",     // multiply-adds, with ranks and channels rounded up to whole vectors
    "steps",        // of the depth, per register block
    "values",       // that the stages write, in whole vectors
    "dots",         // sums whose lanes are added up: few rows or pixels, or a first stage of rank one
    "depthwise",    // multiply-adds of CP's two depthwise stages, additions of Winograd's transforms
    "bytes",        // of input, output and weights
    "far_bytes",    // the part of these bytes that exceeds L2
    "weights",      // packed in the call
    "moved",        // values of an NCHW input and output, which are transposed
    "rows",         // calls of the register kernel, per panel
    "taps",         // that such calls add up for the core
    "odd_stores"};  // values of output rows that meet in the same lines of L1
constexpr const char* kChainFeatureNames[kFeatures] = {
    "calls",        // of a library's convolution or product
    "products",     // multiply-adds of the pointwise stages
    "values",       // that the stages write
    "core",         // multiply-adds of Tucker's core
    "core_inputs",  // the same, per output channel
    "core_inside",  // the core's, without taps outside the image
    "depthwise",
    "far_bytes",  // that all stages read and write beyond L2
    "weights",
    "native_calls",     // of torch's own convolution, which takes small single images
    "native_products",  // multiply-adds of pointwise stages there
    "native_core",      // multiply-adds of the core there
    "native_columns"};  // elements of the core's matrix of windows there
Features fused_features(const Problem& problem, const CpuCaps& caps, const CpuTile& tile);
Features chain_features(const Problem& problem, const CpuCaps& caps);

// Predicted seconds on one thread, or 0 where nothing was measured for the dtype (float64, float16).
double fused_seconds(const Problem& problem, const CpuCaps& caps, const CpuTile& tile);
double chain_seconds(const Problem& problem, const CpuCaps& caps);

}  // namespace lowrank_ops
