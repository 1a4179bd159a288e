// The sizes and the layout of shared memory of the sm90a kernel for low-rank linear layers: for the planner, the
// launcher and the kernel. Plain C++17.
#pragma once

#include "plan/geometry.h"

namespace lowrank_ops {

// A tile is 128 rows of the layer, 64 (the rows of a wgmma) per warpgroup. Matrices in shared memory have rows of 128
// bytes: 64 channels or ranks of 2 bytes.
struct LinearSm90a {
  static constexpr int kRows = 128, kGroupRows = 64, kRowBytes = 128, kSlice = 64;
  static constexpr int kPartBytes = kSlice * kRowBytes;  // 64 rows: of a factor, of a chunk of the output
  static constexpr int kInputBytes = kRows * kRowBytes;  // a slice of the input
  static constexpr int kMostRank = 256;
  static constexpr int kGroups = 2;  // warpgroups that compute
  static constexpr int kThreads = 128 * (kGroups + 1);
  static constexpr int kLeastSlots = 2, kMostSlots = 8;
  static constexpr int kBarrierBytes = 1024;  // 2 x kMostSlots barriers of 8 bytes; what follows is aligned to 1024
  static constexpr int kStagedBytes = 2 * kPartBytes;  // per group: two chunks of the output
  static constexpr int kMostBytes = 232448;            // shared memory of one CTA on every GPU of this architecture

  int parts = 0;                  // parts of 64 ranks: 1, 2 or 4, the rank padded
  int slices = 0, chunks = 0;     // slices of 64 input channels, chunks of 64 output channels
  int slots = 0, slot_bytes = 0;  // slots of the ring: a slice of the input and one of in_factor, or a chunk's block
                                  // of out_factor

  // Offsets in shared memory; bytes in all.
  int staged = 0, ring = 0, bytes = 0;

  // Bytes of a slice of in_factor, and of a chunk's block of out_factor.
  LOWRANK_OPS_BOTH constexpr int block_bytes() const { return parts * kPartBytes; }
};

// `g.stages`: slots of the ring.
constexpr LinearSm90a linear_sm90a_layout(const Geometry& g) {
  using L = LinearSm90a;
  L l;
  l.parts = g.r1 <= 64 ? 1 : g.r1 <= 128 ? 2 : L::kMostRank / L::kSlice;
  l.slices = int(ceil_div(g.s, L::kSlice));
  l.chunks = int(ceil_div(g.t, L::kSlice));
  l.slots = g.stages;
  l.slot_bytes = L::kInputBytes + l.block_bytes();
  l.staged = L::kBarrierBytes;
  l.ring = l.staged + L::kGroups * L::kStagedBytes;
  l.bytes = l.ring + l.slots * l.slot_bytes;
  return l;
}

}  // namespace lowrank_ops
