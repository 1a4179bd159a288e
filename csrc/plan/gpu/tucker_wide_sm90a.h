// The sizes and the layout of shared memory of the sm90a Tucker kernel for ranks of at most 128 and for factors that do
// not fit into shared memory: for the planner, the launcher and the kernel. Plain C++17.
#pragma once

#include "plan/geometry.h"

namespace lowrank_ops {

// A tile is 8x8 pixels of the output, the 64 rows of a wgmma; the CTA computes two at a time, one per warpgroup.
// Matrices in shared memory have rows of 128 bytes: 64 channels or ranks of 2 bytes. Ranks come in parts of 64.
struct TuckerWideSm90a {
  static constexpr int kTileSide = 8, kRowBytes = 128, kSlice = 64;
  static constexpr int kPartBytes = kSlice * kRowBytes;  // 64 rows of a factor
  static constexpr int kRows = 104;  // halo pixels, padded: rows of a hidden tile and of a slice of the input
  static constexpr int kSliceBytes = kRows * kRowBytes;  // a multiple of 1024, as the swizzle needs
  static constexpr int kMostRank = 128;
  static constexpr int kGroups = 2;  // warpgroups that compute
  static constexpr int kThreads = 128 * (kGroups + 1);
  static constexpr int kLeastSlots = 2, kMostSlots = 8;  // slots of the ring of the factors' blocks
  static constexpr int kBarrierBytes = 256;              // 2 x (kMostSlots + kGroups x kMaxStages) barriers of 8 bytes
  static constexpr int kMostBytes = 232448;              // shared memory of one CTA on every GPU of this architecture

  int r1_parts = 0, r2_parts = 0;  // parts of 64 ranks
  int slices = 0, chunks = 0;      // slices of 64 input channels, chunks of 64 output channels
  int input_slots = 0;             // slots of each group's ring of slices
  int slots = 0, slot_bytes = 0;   // slots of the ring of the factors' blocks

  // Offsets in shared memory.
  int bias = 0, hidden = 0, inputs = 0, ring = 0, bytes = 0;

  LOWRANK_OPS_BOTH constexpr int hidden_bytes() const { return most(r1_parts * kSliceBytes, 2 * kPartBytes); }
  // Blocks of the factors that pass through the ring per pair of tiles: in_factor once per plane.
  LOWRANK_OPS_BOTH constexpr int blocks(int taps, int planes) const {
    return planes * slices + taps * r1_parts + chunks;
  }
};

// `g.stages`: slots of each group's ring of slices. The factors' ring takes what is left of shared memory, but at least
// kLeastSlots slots: `bytes` exceeds kMostBytes where those do not fit.
constexpr TuckerWideSm90a wide_sm90a_layout(const Geometry& g) {
  using L = TuckerWideSm90a;
  L l;
  l.r1_parts = g.r1 <= L::kSlice ? 1 : 2;
  l.r2_parts = g.r2 <= L::kSlice ? 1 : 2;
  l.slices = int(ceil_div(g.s, L::kSlice));
  l.chunks = int(ceil_div(g.t, L::kSlice));
  l.input_slots = g.stages;
  l.slot_bytes = most(l.r1_parts, l.r2_parts) * L::kPartBytes;
  l.bias = L::kBarrierBytes;
  l.hidden = int(round_up(l.bias + int64_t(l.chunks) * L::kSlice * 4, 1024));
  l.inputs = l.hidden + L::kGroups * l.hidden_bytes();
  l.ring = l.inputs + L::kGroups * l.input_slots * L::kSliceBytes;
  l.slots = most(L::kLeastSlots, least(L::kMostSlots, (L::kMostBytes - l.ring) / l.slot_bytes));
  l.bytes = l.ring + l.slots * l.slot_bytes;
  return l;
}

}  // namespace lowrank_ops
