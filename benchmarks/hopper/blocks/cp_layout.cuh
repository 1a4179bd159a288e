// The fused CP kernel's plan: its tile, roles, shared memory and barriers.
//
// A CTA stays on its multiprocessor and computes the tiles blockIdx.x, blockIdx.x + gridDim.x, ... A tile is 14x8
// pixels of the output. Its 256 ranks are computed in 4 parts of 64:
//
//   input: 16x10 pixels (halo), 256 channels         stage 1     hidden: 16x10 pixels, 64 ranks    depthwise
//   4 slices [160 pixels][64 channels], for all     -------->    [160 rows of 144 bytes] in       --------->
//   parts of the tile                               in_factor    shared memory, two in turn        down, across
//   second: 14x8 pixels, 64 ranks                    stage 3     sums: 14x8 pixels, 256 channels, in registers,
//   in registers, as operand A                      -------->    stored after the last part
//                                                  out_factor
//
// Stage 1 computes the transpose, ranks x pixels = [64, K] [K, 80]. The depthwise stage reads hidden pixels of both
// warpgroups, hence a barrier of both before it. Stage 1 of the next part and stage 3 of the part before run under it.
//
//   warpgroup 0   stage 1 of halo pixels 0 to 79, then the output's rows 0 to 7, two a warp
//   warpgroup 1   halo pixels 80 to 159, rows 8 to 13 (its last warp has none)
//   warpgroup 2   one thread: all copies to shared memory
//
// Shared memory, from the top:
//
//   input     4 slices [160 pixels][64 channels] in the 128-byte swizzle, of one tile
//   ring      3 blocks of 32 KB, through which both factors stream anew for every tile, a quarter of the ranks each:
//             of in_factor [4 slices][64 ranks][64 channels], of out_factor [256 channels][64 ranks], same swizzle
//   hidden    2 tiles [160 pixels][64 ranks] in rows of 128 + 16 bytes, free of bank conflicts; the 16 bytes of the
//             first tile's rows hold the barriers, one a row, those of the second the bias, 4 channels a row
//   weights   per pair of ranks 12 floats: 3 taps down, 3 across
//
// Barriers:
//
//   full[block], empty[block]   of the ring: a block has arrived; the 8 warps are done with it
//   slice_full[slice]           a slice of the tile's input has arrived
//   input_free                  the 8 warps have issued and awaited their last stage 1 of the tile
#pragma once

#include "cp_block.cuh"

namespace hopper::cp {

// What an ablation leaves out. Its results are wrong.
enum Skip { kNothing = 0, kStore = 1, kInput = 2, kDepthwise = 4, kStage3 = 8 };

// A variant; others derive from it.
struct Plan {
  static constexpr bool prefetch = true;  // the next tile's input to L2
  static constexpr int skip = kNothing;
};

constexpr int kSlices = kChannels / 64, kParts = kRank / 64, kRow = 128;  // bytes of 64 channels
constexpr int kSliceBytes = kHaloPixels * kRow, kFactorSlice = 64 * kRow, kBlockBytes = 4 * kFactorSlice;
constexpr int kBlocks = 3, kGroupPixels = kHaloPixels / 2;
constexpr int kPitch = 144, kHiddenBytes = kHaloPixels * kPitch;
constexpr int kThreads = 384, kSharedLimit = 232448;

constexpr int kInputAt = 0, kRingAt = kSlices * kSliceBytes, kHiddenAt = kRingAt + kBlocks * kBlockBytes;
constexpr int kWeightsAt = kHiddenAt + 2 * kHiddenBytes, kWeightBytes = 48;  // per pair of ranks
constexpr int kSharedBytes = kWeightsAt + kRank / 2 * kWeightBytes;
constexpr int kFullAt = kHiddenAt + kRow, kEmptyAt = kFullAt + kPitch * kBlocks;
constexpr int kSliceFullAt = kEmptyAt + kPitch * kBlocks, kInputFreeAt = kSliceFullAt + kPitch * kSlices;
constexpr int kBiasAt = kHiddenAt + kHiddenBytes + kRow;
static_assert(kSharedBytes <= kSharedLimit && kRingAt % 1024 == 0 && kHiddenAt % 128 == 0, "shared memory");

// The order in which the 8 blocks of a tile are used: in 0, in 1, out 0, in 2, out 1, in 3, out 2, out 3.
DEVICE constexpr int in_place(int part) {
  return part == 0 ? 0 : 2 * part - 1;
}
DEVICE constexpr int out_place(int part) {
  return part == kParts - 1 ? 7 : 2 * part + 2;
}

}  // namespace hopper::cp
