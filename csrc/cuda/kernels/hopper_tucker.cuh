// Shared by the two sm90a Tucker kernels: their parameters, and how a thread's sums get into shared memory.
#pragma once

#include "cuda/kernels/hopper_tiles.cuh"
#include "plan/gpu/planes.h"

namespace lowrank_ops::hopper {

// The pixels of the input that some of the core's taps read (plan/gpu/planes.h).
struct Plane {
  PlaneAxis rows, columns;
  int tap_y, tap_x;  // the first of its taps
  int bytes;         // of a box
};

template <class Layout>
struct TuckerParamsOf {
  CUtensorMap input[kMostPlanes];   // [N, H, W, S] of a plane, boxes of a halo x 64 channels
  CUtensorMap in_factor;            // [R1, S], boxes of all ranks x 64 channels
  CUtensorMap core;                 // [R2, KH, KW, R1], boxes of a tap: all of R2 x 64 of R1
  CUtensorMap out_factor;           // [T, R2], boxes 64 x 64
  CUtensorMap output[kMostPlanes];  // [N, OH, OW, T] of a residue class, boxes 8 x 8 x 64
  const void* bias;                 // [T] or null
  Layout layout;
  Tiles tiles;
  Plane planes[kMostPlanes];     // those of a tile of class 0, then those of class 1, and so on, as in `input`
  int plane_count;               // planes that a tile reads
  int taps, stride_h, stride_w;  // strides: between neighbouring taps of a plane
  int t;
  Activation activation;
};

constexpr int kTuckerRow = 128;  // bytes of a row in shared memory, in the 128-byte swizzle

// Rounds the sums [64 ranks, `rows` pixels] of a warpgroup and stores them as a tile [rows pixels][64 ranks] in shared
// memory.
template <bool half, int rows>
LOWRANK_OPS_HOPPER void store_ranks(uint32_t tile, const float (&sums)[rows / 2], int warp, int lane) {
  // Lanes 8 m to 8 m + 7 give the pixels of matrix m: ranks 16 warp + 8 (m % 2), pixels 8 (m / 2) + lane % 8.
  const uint32_t row = tile + (lane / 16 * 8 + lane % 8) * kTuckerRow + ((warp * 2 + lane / 8 % 2) ^ (lane % 8)) * 16;
#pragma unroll
  for (int j = 0; j + 1 < rows / 8; j += 2)
    store_matrices<true>(row + j * 8 * kTuckerRow, pack<half>(sums[4 * j], sums[4 * j + 1]),
                         pack<half>(sums[4 * j + 2], sums[4 * j + 3]), pack<half>(sums[4 * j + 4], sums[4 * j + 5]),
                         pack<half>(sums[4 * j + 6], sums[4 * j + 7]));
  if constexpr (rows / 8 % 2 == 1) {
    constexpr int j = rows / 8 - 1;
    store_matrices_transposed(row + j * 8 * kTuckerRow, pack<half>(sums[4 * j], sums[4 * j + 1]),
                              pack<half>(sums[4 * j + 2], sums[4 * j + 3]));
  }
}

// Sets the sums [64 pixels, 64 channels] to the channels' bias, which lies in shared memory as floats.
LOWRANK_OPS_HOPPER void start_with_bias(float (&sums)[32], uint32_t bias, int lane) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    float a, b;
    load_shared(bias + lane % 4 * 8 + j * 32, a, b);
    sums[4 * j] = sums[4 * j + 2] = a;
    sums[4 * j + 1] = sums[4 * j + 3] = b;
  }
}

// Rounds the values [64 pixels, 64 channels] of a warpgroup and stages them as rows [64 pixels][64 channels] in shared
// memory.
template <bool half>
LOWRANK_OPS_HOPPER void stage_chunk(uint32_t staged, const float (&values)[32], int warp, int lane) {
  const uint32_t row = staged + (warp * 16 + lane % 8) * kTuckerRow;
#pragma unroll
  for (int upper = 0; upper < 2; ++upper)
#pragma unroll
    for (int j = 0; j < 8; j += 4)
      store_matrices<false>(row + upper * 8 * kTuckerRow + ((j + lane / 8) ^ (lane % 8)) * 16,
                            pack<half>(values[4 * j + 2 * upper], values[4 * j + 2 * upper + 1]),
                            pack<half>(values[4 * j + 4 + 2 * upper], values[4 * j + 5 + 2 * upper]),
                            pack<half>(values[4 * j + 8 + 2 * upper], values[4 * j + 9 + 2 * upper]),
                            pack<half>(values[4 * j + 12 + 2 * upper], values[4 * j + 13 + 2 * upper]));
}

// Writes chunk number `chunk` of the tile's output channels: stages it at one of two places over the group's hidden
// tile, from where TMA stores it. The group's first thread has to wait for these stores before it ends.
template <bool half>
LOWRANK_OPS_HOPPER void store_chunk(const CUtensorMap* output, uint32_t hidden, const float (&values)[32], int chunk,
                                    const TilePlace& at, int group, int warp, int lane) {
  const bool first_thread = warp == 0 && lane == 0;
  const uint32_t staged = hidden + chunk % 2 * 64 * kTuckerRow;
  // Chunk 0 waits until all warps have read the hidden tile; chunk 2 and later ones until TMA has read the place that
  // the chunk staged two before.
  if (chunk != 1) {
    if (chunk > 1 && first_thread) wait_stores_read<1>();
    group_barrier(group);
  }
  stage_chunk<half>(staged, values, warp, lane);
  fence_proxy();
  group_barrier(group);
  if (first_thread) {
    store_box(output, staged, chunk * 64, at.x, at.y, at.n);
    commit_stores();
  }
}

// All threads of the CTA put the bias into shared memory as floats: zeros beyond T, and where there is no bias.
template <bool half, class Layout>
LOWRANK_OPS_HOPPER void store_bias(const TuckerParamsOf<Layout>& p, uint32_t base) {
  const uint16_t* const bias = static_cast<const uint16_t*>(p.bias);
  for (int i = int(threadIdx.x); i < p.layout.chunks * 64; i += Layout::kThreads)
    store_shared(base + p.layout.bias + i * 4, bias && i < p.t ? widen<half>(bias[i]) : 0);
}

}  // namespace lowrank_ops::hopper
