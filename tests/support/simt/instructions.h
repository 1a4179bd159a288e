// From what each lane of a warp did to the instructions of the warp.
//
// Sectors and bank conflicts belong to an instruction of a warp, but here its lanes run one after the other. So each
// lane leaves a trace of its accesses, and when the lanes meet (barrier, load_matrices, multiply_add) the traces are
// merged. Lanes that went the same way are simply laid side by side. Otherwise an access that all lanes made equally
// often (by place in the source, primitive and size) divides the traces into rounds, which are merged one by one: best
// commit_copies, or what every trace begins with, like the first access in a loop. Where there is none, as many
// accesses as possible, in their order, are taken for the same instructions (the longest common subsequence).
//
// Exact where lanes differ by what a condition inside of a loop's round guards. Where lanes skip whole rounds, nothing
// tells which, and an instruction may be taken apart or two mixed up.
#pragma once

#include <cstdint>
#include <vector>

#include "simulator.h"

namespace lowrank_ops::simulator {

struct Instruction {
  What what;
  uint32_t lanes;  // a bit for each that took part
  uintptr_t address[kLanes];
};

// Of what the lanes did since they last met; empties the traces. Valid until the next call.
const std::vector<Instruction>& merge_traces(Warp& warp);

}  // namespace lowrank_ops::simulator
