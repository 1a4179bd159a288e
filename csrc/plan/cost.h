// The cost model: FLOPs, bytes and predicted seconds of a block, fused and as a chain. Plain C++17.
#pragma once

#include "plan/plan.h"

namespace lowrank_ops {

double block_flops(const Problem& problem);                      // of the chain: every stage once
double fused_flops(const Problem& problem, const CpuTile& tile);  // with the halo that strips and columns recompute
double block_bytes(const Problem& problem);                      // input + output + weights, once
double hidden_bytes(const Problem& problem);                     // intermediates of the chain, written and read

double fused_seconds(const Problem& problem, const CpuCaps& caps, const CpuTile& tile);
double chain_seconds(const Problem& problem, const CpuCaps& caps);

}  // namespace lowrank_ops
