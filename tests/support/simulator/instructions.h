// Finds the instructions of a warp from the accesses of its lanes.
//
// Sectors and bank conflicts belong to an instruction of a warp, but here the lanes run one after the other. So each
// lane records a trace of its accesses, and when the lanes meet (barrier, load_matrices, multiply_add) the traces are
// merged. Where all traces are alike, access number i of all lanes is instruction number i. Otherwise an access that
// occurs equally often in all traces (by place in the source, primitive and size) divides the traces into rounds, which
// are merged one by one; commit_copies is the best such divider, then an access with which every trace begins, like the
// first one in a loop. Without a divider, as many accesses as possible, in their order, are taken for the same
// instructions (the longest common subsequence).
//
// The result is exact where lanes differ only in accesses that a condition inside of a loop guards. Where lanes skip
// whole rounds of a loop, it cannot be known which ones, and one instruction may be counted as two, or two be mixed up.
#pragma once

#include <cstdint>
#include <vector>

#include "simulator.h"

namespace lowrank_ops::simulator {

struct Instruction {
  AccessKind what;
  uint32_t lanes;  // one bit per lane that took part
  uintptr_t address[kLanes];
};

// The instructions since the lanes last met. Empties the traces. The result is valid until the next call.
const std::vector<Instruction>& merge_traces(Warp& warp);

}  // namespace lowrank_ops::simulator
