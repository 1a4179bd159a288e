// The sm90a CP kernel's sizes and its layout of shared memory, for the planner, the launcher and the kernel. Plain
// C++17.
#pragma once

#include "plan/geometry.h"

namespace lowrank_ops {

// A tile is 14x8 pixels of the output, its halo 16x10, as the window is 3x3. With a stride of 2 a tile is about half as
// long along that axis, so that its halo is not larger. Matrices in shared memory have rows of 128 bytes: 64 channels
// or ranks of 2 bytes. Rows of the hidden tiles are 16 bytes longer.
struct CpSm90a {
  static constexpr int kTileHeight = 14, kTileWidth = 8, kTaps = 3;
  static constexpr int kHaloWidth = 10, kHaloPixels = 160;
  static constexpr int kRowBytes = 128, kSlice = 64, kPitch = 144;
  static constexpr int kSliceBytes = kHaloPixels * kRowBytes, kHiddenBytes = kHaloPixels * kPitch;
  static constexpr int kBlockBytes = kSlice * kRowBytes;  // 64 rows of a factor
  static constexpr int kPairBytes = 48;                   // the depthwise weights of two ranks, as floats
  static constexpr int kThreads = 384;                    // two warpgroups that compute, and one that copies
  static constexpr int kMostChannels = 256;               // S, T
  static constexpr int kMostStride = 2;                   // in units (plan/geometry.h)
  static constexpr int kMostRank = 1024;
  static constexpr int kMostBytes = 232448;  // shared memory of one CTA on every GPU of this architecture

  int slices = 0, parts = 0;  // slices of 64 input channels, parts of 64 ranks
  int channels = 0;           // T, padded to 64, 128 or 256
  int slots = 0;              // slots of the ring that the factors' parts stream through

  // Offsets in shared memory; bytes per slot; bytes in all.
  int ring = 0, hidden = 0, weights = 0, slot_bytes = 0, bytes = 0;
};

// Pixels of a tile; strides in units (plan/geometry.h).
constexpr int cp_tile_height(int stride_h, int stride_w) {
  return stride_h == 1 ? CpSm90a::kTileHeight : stride_w == 1 ? 7 : 8;
}
constexpr int cp_tile_width(int stride_w) {
  return CpSm90a::kTileWidth / stride_w;
}
constexpr bool halo_fits(int stride_h, int stride_w) {
  return ((cp_tile_height(stride_h, stride_w) - 1) * stride_h + CpSm90a::kTaps) *
             ((cp_tile_width(stride_w) - 1) * stride_w + CpSm90a::kTaps) <=
         CpSm90a::kHaloPixels;
}
static_assert(halo_fits(1, 1) && halo_fits(1, 2) && halo_fits(2, 1) && halo_fits(2, 2), "halos");

// `g.stages`: slots of the ring.
constexpr CpSm90a cp_sm90a_layout(const Geometry& g) {
  using L = CpSm90a;
  L l;
  l.slices = int(ceil_div(g.s, L::kSlice));
  l.parts = int(ceil_div(g.r1, L::kSlice));
  l.channels = g.t <= 64 ? 64 : g.t <= 128 ? 128 : L::kMostChannels;
  l.slots = g.stages;
  l.slot_bytes = most(l.slices * L::kBlockBytes, l.channels * L::kRowBytes);
  l.ring = l.slices * L::kSliceBytes;
  l.hidden = l.ring + l.slots * l.slot_bytes;
  l.weights = l.hidden + 2 * L::kHiddenBytes;
  l.bytes = l.weights + l.parts * (L::kSlice / 2) * L::kPairBytes;
  return l;
}

}  // namespace lowrank_ops
