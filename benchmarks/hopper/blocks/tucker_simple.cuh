// The Tucker-2 block in its plainest form, to tell what is wrong when something is: one warpgroup, one tile after the
// other, pixels times factor in stage 1, a barrier after every step, 4-byte stores. The same layout as `Plan`; two
// barriers, one for a tile's input and one for all factors.
#pragma once

#include "tucker_layout.cuh"

namespace hopper::tucker {

using SimpleLayout = Layout<Plan>;

DEVICE void simple_load_factors(uint32_t base, uint32_t ready, const Maps& maps) {
  using L = SimpleLayout;
  barrier_expect(ready, kInBytes + kCoreBytes + kOutBytes);
  for (int s = 0; s < kSlices; ++s)
    tma_load_2d(base + L::in_factor + s * kFactorSlice, &maps.in_factor, ready, s * 64, 0);
  for (int tap = 0; tap < kCoreTaps; ++tap)
    tma_load_2d(base + L::core + tap * kFactorSlice, &maps.core, ready, tap * kRank, 0);
  for (int part = 0; part < 4; ++part)
    tma_load_2d(base + L::out_factor + part * kFactorSlice, &maps.out_factor, ready, 0, part * 64);
}

DEVICE void simple_load_input(uint32_t base, uint32_t ready, const Maps& maps, const TilePlace& place) {
  barrier_expect(ready, kSlices * kSliceBytes);
  for (int s = 0; s < kSlices; ++s)
    tma_load_4d(base + s * kSlotBytes, &maps.input, ready, s * 64, place.x - 1, place.y - 1, place.n);
}

// To the hidden tile: pixels 0 to 63 and 64 to 127, of which 100 count.
DEVICE void simple_stage1(uint32_t base, uint32_t hidden, int warp, int lane) {
  float low[32], high[32];
#pragma unroll
  for (int j = 0; j < 32; ++j) low[j] = high[j] = 0;
  pin(low);
  pin(high);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 16; ++k) {
    const uint64_t pixels = swizzled(base + k / 4 * kSlotBytes + k % 4 * 32, 1024);
    const uint64_t matrix = swizzled(base + SimpleLayout::in_factor + k / 4 * kFactorSlice + k % 4 * 32, 1024);
    wgmma(low, pixels, matrix);
    wgmma(high, further(pixels, 64 * kRow), matrix);
  }
  wgmma_commit();
  wgmma_wait<0>();
  pin(low);
  pin(high);
  __syncthreads();
  store_rows(hidden + warp * 16 * kRow, lane, low);
  store_rows(hidden + (64 + warp * 16) * kRow, lane, high, 64 + warp * 16 < kHaloRows, 64 + warp * 16 + 8 < kHaloRows);
  fence_proxy();
  __syncthreads();
}

DEVICE void simple_stage2(uint32_t (&second)[4][4], uint32_t base, uint32_t hidden) {
  float sums[32];
#pragma unroll
  for (int j = 0; j < 32; ++j) sums[j] = 0;
  pin(sums);
  wgmma_fence();
#pragma unroll
  for (int tap = 0; tap < kCoreTaps; ++tap)
#pragma unroll
    for (int k = 0; k < 4; ++k)
      wgmma(sums, swizzled(hidden + (tap / 3 * kHaloSide + tap % 3) * kRow + k * 32, kHaloSide * kRow),
            swizzled(base + SimpleLayout::core + tap * kFactorSlice + k * 32, 1024));
  wgmma_commit();
  wgmma_wait<0>();
  pin(sums);
#pragma unroll
  for (int j = 0; j < 16; ++j) second[j / 4][j % 4] = pack(sums[2 * j], sums[2 * j + 1]);
}

// One chunk of 64 channels; `pixel` is the lane's first, at its first channel of the chunk.
DEVICE void simple_stage3(uint32_t (&second)[4][4], uint32_t factor, const float* bias, uint16_t* pixel) {
  float sums[32];
#pragma unroll
  for (int j = 0; j < 32; ++j) sums[j] = 0;
  pin(sums);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k) wgmma(sums, second[k], swizzled(factor + k * 32, 1024));
  wgmma_commit();
  wgmma_wait<0>();
  pin(sums);
#pragma unroll
  for (int k = 0; k < 4; ++k) pin(second[k]);
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    const int channel = j / 2 * 8;
    *reinterpret_cast<uint32_t*>(pixel + j % 2 * kSize * kChannels + channel) =
        pack(sums[2 * j] + bias[channel], sums[2 * j + 1] + bias[channel + 1]);
  }
}

__global__ void __launch_bounds__(128, 1) simple_kernel(const __grid_constant__ Arguments arguments) {
  const uint32_t base = shared_base(), ready = base + SimpleLayout::full, hidden = base + SimpleLayout::hidden;
  const int warp = __shfl_sync(~0u, int(threadIdx.x) / 32, 0), lane = int(threadIdx.x) % 32;
  if (threadIdx.x == 0) {
    barrier_init(ready, 1);
    barrier_init(ready + 8, 1);
    barrier_init_done();
  }
  __syncthreads();
  if (threadIdx.x == 0) simple_load_factors(base, ready + 8, arguments.maps);
  wait_phase(ready + 8, 0);
  uint32_t parity = 0;
#pragma unroll 1
  for (int tile = int(blockIdx.x); tile < arguments.tiles; tile += int(gridDim.x), parity ^= 1) {
    const TilePlace place = tile_place(tile);
    if (threadIdx.x == 0) simple_load_input(base, ready, arguments.maps, place);
    wait_phase(ready, parity);
    __syncwarp();
    simple_stage1(base, hidden, warp, lane);
    uint32_t second[4][4];
    simple_stage2(second, base, hidden);
    uint16_t* const pixel =
        arguments.out + ((size_t(place.n) * kSize + place.y + warp * 2) * kSize + place.x + lane / 4) * kChannels;
#pragma unroll 1
    for (int chunk = 0; chunk < 4; ++chunk) {
      const int channel = chunk * 64 + lane % 4 * 2;
      simple_stage3(second, base + SimpleLayout::out_factor + chunk * kFactorSlice, arguments.bias + channel,
                    pixel + channel);
    }
    __syncthreads();
  }
}

}  // namespace hopper::tucker
