// The cost model: FLOPs, bytes and predicted seconds of a block, fused and as a chain. Plain C++17.
//
// A prediction is a sum of features (counts that can be read off a problem) times constants in nanoseconds. The
// constants are fitted from committed benchmark results by benchmarks/fit_cost.py, which writes cost_constants.inc; the
// machine they were measured on stands there. Only the ratio of the two predictions decides, so they carry over to
// other CPUs of the same kind better than seconds would; where they do not, the policy "measure" does not need them.
#pragma once

#include <array>

#include "plan/plan.h"

namespace lowrank_ops {

double block_flops(const Problem& problem);                       // of the chain: every stage once
double fused_flops(const Problem& problem, const CpuTile& tile);  // with the halo that strips and columns recompute
// Multiply-adds of one task: output rows [first, last) of a tile's columns of one image, halo included.
double strip_multiply_adds(const Problem& problem, const CpuTile& tile, int64_t first, int64_t last);
double packed_elements(const Problem& problem);  // of the factors that products read packed: all but CP's taps
double block_bytes(const Problem& problem);      // input + output + weights, once
double hidden_bytes(const Problem& problem);     // intermediates of the chain, written and read

// The features of one way to run a problem on one thread, in the order of `kFeatureNames`. Predictions know nothing of
// the number of threads, so that it cannot change the path, and with it the bits, of a result.
constexpr int kFeatures = 6;
constexpr const char* kFeatureNames[kFeatures] = {"calls", "multiply_adds", "depthwise", "bytes", "weights", "moved"};
using Features = std::array<double, kFeatures>;
Features fused_features(const Problem& problem, const CpuTile& tile);
Features chain_features(const Problem& problem);

// Predicted seconds on one thread, or 0 where nothing was measured for the dtype (float64, float16).
double fused_seconds(const Problem& problem, const CpuTile& tile);
double chain_seconds(const Problem& problem);

}  // namespace lowrank_ops
