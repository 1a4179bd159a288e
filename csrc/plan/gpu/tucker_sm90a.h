// The sm90a Tucker kernel's sizes and its layout of shared memory, for the planner, the launcher and the kernel. Plain
// C++17.
#pragma once

#include "plan/gpu/planes.h"

namespace lowrank_ops {

// A tile is 8x8 pixels of the output, the 64 rows of a wgmma. Matrices in shared memory have rows of 128 bytes: 64
// channels or ranks of 2 bytes.
struct TuckerSm90a {
  static constexpr int kTileSide = 8, kRowBytes = 128, kSlice = 64;
  static constexpr int kBlockBytes = kSlice * kRowBytes;  // 64 rows: a slice of a factor, a chunk of the output
  static constexpr int kGroups = 2;                       // warpgroups that compute
  static constexpr int kThreads = 128 * (kGroups + 1);
  static constexpr int kMostRank = 64, kMostRows = 144;  // kMostRows: of the hidden tile
  static constexpr int kMostSlots = 8;
  static constexpr int kBarrierBytes = 256;  // kMostSlots x (kGroups + 1) + 3 barriers of 8 bytes
  static constexpr int kMostBytes = 232448;  // shared memory of one CTA on every GPU of this architecture

  int rows = 0;   // rows of a slice of the input and of the hidden tile: halo pixels, padded to a size that wgmma takes
  int ranks = 0;  // 32 or 64: R1 and R2, padded
  int slices = 0, chunks = 0;  // slices of 64 input channels, chunks of 64 output channels
  int slots = 0;               // slots of the ring of slices that the groups share
  int skip = 0;                // slots between the end of a group's plane and the beginning of its next one

  // Offsets in shared memory.
  int bias = 0, hidden = 0, in_factor = 0, core = 0, out_factor = 0, ring = 0, bytes = 0;

  // A multiple of 1024, as rows are a multiple of 8.
  LOWRANK_OPS_BOTH constexpr int slice_bytes() const { return rows * kRowBytes; }
  LOWRANK_OPS_BOTH constexpr int hidden_bytes() const { return most(slice_bytes(), 2 * kBlockBytes); }
};

// `g.stages`: slots of the ring.
constexpr TuckerSm90a sm90a_layout(const Geometry& g) {
  using L = TuckerSm90a;
  L l;
  l.rows = plane_pixels(g) <= 104 ? 104 : L::kMostRows;
  l.ranks = most(g.r1, g.r2) <= 32 ? 32 : L::kMostRank;
  l.slices = int(ceil_div(g.s, L::kSlice));
  l.chunks = int(ceil_div(g.t, L::kSlice));
  l.slots = g.stages;
  l.skip = l.slices % l.slots;
  l.bias = L::kBarrierBytes;
  l.hidden = int(round_up(l.bias + int64_t(l.chunks) * L::kSlice * 4, 1024));
  l.in_factor = l.hidden + L::kGroups * l.hidden_bytes();
  l.core = l.in_factor + l.slices * L::kBlockBytes;
  l.out_factor = l.core + g.taps() * l.ranks * L::kRowBytes;
  l.ring = l.out_factor + l.chunks * L::kBlockBytes;
  l.bytes = l.ring + l.slots * l.slice_bytes();
  return l;
}

}  // namespace lowrank_ops
