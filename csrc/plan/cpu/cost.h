// The cost model: FLOPs, bytes and predicted seconds of a block, fused and as a chain. Plain C++17.
//
// A prediction is a sum of features (counts that can be read off a problem, features.cpp) times constants in
// nanoseconds. The constants are fitted by benchmarks/studies/fit_cost.py, from committed results of the networks'
// layers and of random blocks, for each op, dtype, layout and class of instruction sets (and apart for Tucker blocks
// with a rank of one): what a kernel of 8 lanes takes against oneDNN with the same instructions differs from what one
// of 16 lanes takes. Only the ratio of the two predictions decides, so the constants carry over to other CPUs of a
// class better than seconds would; where they do not, the policy "measure" does not need them. cost_constants.inc says
// on which machine they were measured.
#pragma once

#include <array>

#include "plan/cpu/planner.h"

namespace lowrank_ops {

double block_flops(const Problem& problem);                       // of the chain: every stage once
double fused_flops(const Problem& problem, const CpuTile& tile);  // with the halo that strips and columns recompute
// Multiply-adds of one task: output rows [first, last) of a tile's columns of one image, halo included.
double strip_multiply_adds(const Problem& problem, const CpuTile& tile, int64_t first, int64_t last);
double packed_elements(const Problem& problem);  // of the factors that products read packed: all but CP's taps
double weight_elements(const Problem& problem);  // of all factors
double image_elements(const Problem& problem);   // of input and output
double depthwise_sums(const Problem& problem);   // multiply-adds of an image; CP only
double block_bytes(const Problem& problem);      // input + output + weights, once
double hidden_bytes(const Problem& problem);     // intermediates of the chain, written and read

double fused_products(const Problem& problem, const CpuTile& tile);  // multiply-adds of these, but for depthwise sums

double winograd_sums(const Problem& problem, Winograd winograd);  // additions of the transforms of an image

// The features of one way to run a problem on one thread. Predictions know nothing of the number of threads, so that it
// cannot change the path, and with it the bits, of a result.
constexpr int kFeatures = 13;
using Features = std::array<double, kFeatures>;
constexpr const char* kFusedFeatureNames[kFeatures] = {
    "calls",        // 1
    "products",     // multiply-adds, ranks and channels in whole vectors
    "steps",        // of the depth, for each register block
    "values",       // written by a stage, in whole vectors
    "dots",         // sums whose lanes are added up: few rows or pixels, a first stage of rank one
    "depthwise",    // multiply-adds of CP's two stages, and transforms
    "bytes",        // of input, output and weights
    "far_bytes",    // of these, what exceeds L2
    "weights",      // packed in the call
    "moved",        // values of an NCHW input and output
    "rows",         // calls of the register kernel, for each panel
    "taps",         // that such a call of the core adds up
    "odd_stores"};  // values of rows that meet in the same lines of L1
constexpr const char* kChainFeatureNames[kFeatures] = {
    "calls",        // of a library's convolution or product
    "products",     // multiply-adds of the pointwise stages
    "values",       // that a stage writes
    "core",         // multiply-adds of Tucker's core
    "core_inputs",  // the same for each output channel,
    "core_inside",  // and of the core, without taps outside the image
    "depthwise",
    "far_bytes",  // what all stages read and write beyond L2
    "weights",
    "native_calls",     // of torch's own convolution: small single images
    "native_products",  // multiply-adds of pointwise stages there
    "native_core",      // of the core there,
    "native_columns"};  // and the elements of its matrix of windows
Features fused_features(const Problem& problem, const CpuCaps& caps, const CpuTile& tile);
Features chain_features(const Problem& problem, const CpuCaps& caps);

// Predicted seconds on one thread, or 0 where nothing was measured for the dtype (float64, float16).
double fused_seconds(const Problem& problem, const CpuCaps& caps, const CpuTile& tile);
double chain_seconds(const Problem& problem, const CpuCaps& caps);

}  // namespace lowrank_ops
