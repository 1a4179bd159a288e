// The fused Tucker-2 kernel; tucker_layout.cuh draws it.
#pragma once

#include "tucker_layout.cuh"

namespace hopper::tucker {

// Copies core and out_factor, which are needed later than the first tile.
template <class P>
DEVICE void load_late_factors(uint32_t base, const Maps& maps) {
  using L = Layout<P>;
  barrier_expect(base + L::core_ready, kCoreBytes);
  for (int tap = 0; tap < kCoreTaps; ++tap)
    tma_load_2d(base + L::core + tap * kFactorSlice, &maps.core, base + L::core_ready, tap * kRank, 0);
  barrier_expect(base + L::out_ready, kOutBytes);
  for (int part = 0; part < 4; ++part)
    if constexpr (P::tma_store)
      tma_load_2d(base + L::out_factor + part * kFactorSlice, &maps.out_factor, base + L::out_ready, 0, part * 64);
    else
      tma_load_5d(base + L::out_factor + part * kFactorSlice, &maps.out_factor_permuted, base + L::out_ready, 0, 0, 0,
                  0, part * 2);
}

// The thread that copies.
template <class P>
DEVICE void produce(uint32_t base, const Maps& maps, int tiles) {
  using L = Layout<P>;
  if constexpr (!P::registers) {
    barrier_expect(base + L::in_ready, kInBytes);
    for (int s = 0; s < kSlices; ++s)
      tma_load_2d(base + L::in_factor + s * kFactorSlice, &maps.in_factor, base + L::in_ready, s * 64, 0);
  }
  int slot = 0, awaited = 0;
  uint32_t parity = 1;  // of the slot's emptying before
  bool again = false;   // beyond the first use of the slots
  for (int tile = int(blockIdx.x); tile < tiles; tile += int(gridDim.x)) {
    const TilePlace place = tile_place(tile);
#pragma unroll 1
    for (int s = 0; s < kSlices; ++s) {
      const uint32_t full = base + L::full + awaited * 8;
      wait_phase(base + L::empty + slot * 8, parity);
      if ((P::skip & kLoad) && again) {
        barrier_arrive(full);
      } else {
        barrier_expect(full, kSliceBytes);
        tma_load_4d(base + slot * kSlotBytes, &maps.input, full, s * 64, place.x - 1, place.y - 1, place.n);
      }
      if (++slot == P::slots) slot = 0, parity ^= 1, again = true;
      if (++awaited == L::awaited) awaited = 0;
    }
    if (tile == int(blockIdx.x)) load_late_factors<P>(base, maps);
  }
}

// Clocks that a warpgroup spent waiting, in stage 1, storing the hidden tile, in stage 2 and in stage 3.
template <bool on>
struct Laps {
  uint32_t spent[5] = {}, mark = 0, begin = 0;

  DEVICE void start() {
    if constexpr (on) begin = mark = now();
  }
  DEVICE void lap(int which) {
    if constexpr (on) {
      const uint32_t time = now();
      spent[which] += time - mark;
      mark = time;
    }
  }
  DEVICE void write(uint32_t* to, int tiles) {
    if constexpr (on) {
      for (int j = 0; j < 5; ++j) to[j] = spent[j];
      to[5] = now() - begin;
      to[6] = uint32_t(tiles);
    }
  }
};

// A thread of a warpgroup that computes. `i` counts the tiles of the CTA.
template <class P>
struct Consumer {
  using L = Layout<P>;
  static constexpr int kFactors = P::registers ? kSlices * 4 : 1, kChunks = kChannels / 64;
  static constexpr int kSums = P::overlap ? 2 : 1;  // sets of sums in stage 3

  const Maps& maps;
  uint16_t* out;
  int store_anyway;
  uint32_t base;
  int group, warp, lane;
  uint32_t hidden;
  bool first_thread;
  Laps<P::profile> laps;

  // in_factor's rows of this warp, as operands.
  DEVICE void load_factor(uint32_t (&factor)[kFactors][4], const uint16_t* in_factor) {
    if constexpr (P::registers) {
      const uint16_t* from = in_factor + (warp * 16 + lane / 4) * kChannels + lane % 4 * 2;
#pragma unroll
      for (int k = 0; k < kSlices * 4; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          factor[k][i] = *reinterpret_cast<const uint32_t*>(from + i % 2 * 8 * kChannels + k * 16 + i / 2 * 8);
    } else {
      wait_phase(base + L::in_ready, 0);
    }
  }

  DEVICE int slot_of(int i, int s) { return (i * kSlices + s) % P::slots; }
  DEVICE void wait_slice(int i, int s) {
    const int turn = i / P::groups;
    wait_phase(base + L::full + ((turn % L::turns * P::groups + group) * 4 + s) * 8, uint32_t(turn / L::turns) & 1);
    __syncwarp();  // the warp is one again
  }
  DEVICE void release_slice(int i, int s) {
    if (lane == 0) barrier_arrive(base + L::empty + slot_of(i, s) * 8);
  }

  // Stage 1: hidden' [64, halo pixel] = in_factor input'. A slot is given back when the products of the next slice have
  // been issued and its own are done.
  DEVICE void stage1(float (&sums)[52], const uint32_t (&factor)[kFactors][4], int i) {
#pragma unroll
    for (int j = 0; j < 52; ++j) sums[j] = 0;
    pin(sums);
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
      wait_slice(i, s);
      if (s == 0) laps.lap(0);
      const uint64_t pixels = swizzled(base + slot_of(i, s) * kSlotBytes, 1024);
      wgmma_fence();
      if constexpr (!(P::skip & kStage1)) {
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if constexpr (P::registers)
            wgmma(sums, factor[s * 4 + k], further(pixels, k * 32));
          else
            wgmma(sums, further(swizzled(base + L::in_factor, 1024), s * kFactorSlice + k * 32),
                  further(pixels, k * 32));
      }
      wgmma_commit();
      if (s > 0) {
        wgmma_wait<1>();
        release_slice(i, s - 1);
      }
    }
    wgmma_wait<0>();
    release_slice(i, kSlices - 1);
    pin(sums);
    laps.lap(1);
  }

  DEVICE void store_hidden(const float (&sums)[52]) {
    if (P::tma_store && first_thread) tma_store_wait_read<0>();
    group_barrier(group);  // all warps are done with the hidden tile before
    // Lanes 8 m to 8 m + 7 give the pixels of matrix m: channels 16 warp + 8 (m % 2), pixels 8 (m / 2) + lane % 8.
    const uint32_t row = hidden + (lane / 16 * 8 + lane % 8) * kRow + ((warp * 2 + lane / 8 % 2) ^ (lane % 8)) * 16;
#pragma unroll
    for (int j = 0; j < 12; j += 2)
      store_matrices<true>(row + j * 8 * kRow, pack(sums[4 * j], sums[4 * j + 1]),
                           pack(sums[4 * j + 2], sums[4 * j + 3]), pack(sums[4 * j + 4], sums[4 * j + 5]),
                           pack(sums[4 * j + 6], sums[4 * j + 7]));
    store_matrices_transposed(row + 12 * 8 * kRow, pack(sums[48], sums[49]), pack(sums[50], sums[51]));
    fence_proxy();
    group_barrier(group);
    laps.lap(2);
  }

  // Stage 2: the core's taps are windows of the hidden tile.
  DEVICE void stage2(uint32_t (&second)[4][4], int i) {
    if (i < P::groups) wait_phase(base + L::core_ready, 0);
    __syncwarp();
    float sums[32];
#pragma unroll
    for (int j = 0; j < 32; ++j) sums[j] = 0;
    pin(sums);
    wgmma_fence();
    const uint64_t pixels = swizzled(hidden, kHaloSide * kRow), core = swizzled(base + L::core, 1024);
#pragma unroll
    for (int tap = 0; tap < (P::skip & kStage2 ? 1 : kCoreTaps); ++tap)
#pragma unroll
      for (int k = 0; k < 4; ++k)
        wgmma(sums, further(pixels, (tap / 3 * kHaloSide + tap % 3) * kRow + k * 32),
              further(core, tap * kFactorSlice + k * 32));
    wgmma_commit();
    wgmma_wait<0>();
    pin(sums);
#pragma unroll
    for (int j = 0; j < 16; ++j) second[j / 4][j % 4] = pack(sums[2 * j], sums[2 * j + 1]);
    laps.lap(3);
  }

  // The sums of stage 3 start as the bias. Where lanes store vectors, the rows of out_factor are permuted within 32
  // such that a lane's sums 16 b + 4 j + e (+ 2 for the second row) are channel 32 b + 8 (lane % 4) + 2 j + e.
  DEVICE void start_with_bias(float (&sums)[32], int chunk) {
    if constexpr (P::tma_store) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        float a, b;
        load_shared(base + bias_place(chunk * 64 + j * 8) + lane % 4 * 8, a, b);
        sums[4 * j] = sums[4 * j + 2] = a;
        sums[4 * j + 1] = sums[4 * j + 3] = b;
      }
    } else {
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        float values[8];
        const uint32_t from = base + bias_place(chunk * 64 + b * 32) + lane % 4 * 32;
        load_shared(from, values[0], values[1], values[2], values[3]);
        load_shared(from + 16, values[4], values[5], values[6], values[7]);
#pragma unroll
        for (int i = 0; i < 16; ++i) sums[b * 16 + i] = values[i / 4 * 2 + i % 2];
      }
    }
  }

  DEVICE void multiply(float (&sums)[32], const uint32_t (&second)[4][4], int chunk) {
    start_with_bias(sums, chunk);
    pin(sums);
    wgmma_fence();
    if constexpr (!(P::skip & kStage3)) {
#pragma unroll
      for (int k = 0; k < 4; ++k)
        wgmma(sums, second[k], further(swizzled(base + L::out_factor, 1024), chunk * 64 * kRow + k * 32));
    }
    wgmma_commit();
  }

  // By the copy engine. The hidden tile is free, and holds two chunks on their way out.
  DEVICE void store_by_tma(const float (&done)[32], int chunk, const TilePlace& place) {
    const uint32_t staging = hidden + chunk % 2 * kFactorSlice;
    if (chunk != 1) {
      if (chunk > 1 && first_thread) tma_store_wait_read<1>();
      group_barrier(group);
    }
    store_rows(staging + warp * 16 * kRow, lane, done);
    fence_proxy();
    group_barrier(group);
    if (first_thread && (!(P::skip & kStore) || store_anyway)) {
      tma_store_4d(&maps.output, staging, chunk * 64, place.x, place.y, place.n);
      tma_store_commit();
    }
  }

  // By the lanes, 8 channels each; `pixel` is the lane's first of the chunk, its second lies a row below.
  DEVICE void store_by_lanes(const float (&done)[32], uint16_t* pixel) {
#pragma unroll
    for (int b = 0; b < 2; ++b)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* of = done + b * 16 + half * 2;
        if (!(P::skip & kStore) || store_anyway)
          store_global(pixel + b * 32 + half * kSize * kChannels, pack(of[0], of[1]), pack(of[4], of[5]),
                       pack(of[8], of[9]), pack(of[12], of[13]));
      }
  }

  // Stage 3, in chunks of 64 channels: the products of one run under the rounding and storing of the one before. A loop
  // where registers are few.
  DEVICE void stage3(uint32_t (&second)[4][4], int i, const TilePlace& place) {
    if (i < P::groups) wait_phase(base + L::out_ready, 0);
    __syncwarp();
    float sums[kSums][32];
    uint16_t* const pixel =
        out + ((size_t(place.n) * kSize + place.y + warp * 2) * kSize + place.x + lane / 4) * kChannels + lane % 4 * 8;
    if constexpr (P::overlap) multiply(sums[0], second, 0);
#pragma unroll(P::overlap ? kChunks : 1)
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      if constexpr (!P::overlap) multiply(sums[chunk % kSums], second, chunk);
      if (P::overlap && chunk + 1 < kChunks) {
        multiply(sums[(chunk + 1) % kSums], second, chunk + 1);
        wgmma_wait<1>();
      } else {
        wgmma_wait<0>();
#pragma unroll
        for (int k = 0; k < 4; ++k) pin(second[k]);
      }
      float (&done)[32] = sums[chunk % kSums];
      pin(done);
      if constexpr (P::tma_store)
        store_by_tma(done, chunk, place);
      else
        store_by_lanes(done, pixel + chunk * 64);
    }
    laps.lap(4);
  }

  DEVICE void run(const uint16_t* in_factor, int tiles, uint32_t* profile) {
    const int count = (tiles - int(blockIdx.x) + int(gridDim.x) - 1) / int(gridDim.x);
    laps.start();
    uint32_t factor[kFactors][4];
    load_factor(factor, in_factor);
#pragma unroll 1
    for (int i = group; i < count; i += P::groups) {
      const TilePlace place = tile_place(int(blockIdx.x) + i * int(gridDim.x));
      {
        float sums[52];
        stage1(sums, factor, i);
        store_hidden(sums);
      }
      uint32_t second[4][4];
      stage2(second, i);
      stage3(second, i, place);
    }
    if (P::tma_store && first_thread) tma_store_wait_all();
    if (P::profile && first_thread)
      laps.write(profile + (int(blockIdx.x) * P::groups + group) * 8,
                 count > group ? (count - group + P::groups - 1) / P::groups : 0);
  }
};

template <class P>
__global__ void __launch_bounds__(Layout<P>::threads, 1) tucker_kernel(const __grid_constant__ Arguments arguments) {
  using L = Layout<P>;
  const uint32_t base = shared_base();
  const int warp = __shfl_sync(~0u, int(threadIdx.x) / 32, 0), lane = int(threadIdx.x) % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < L::awaited; ++i) barrier_init(base + L::full + i * 8, 1);
    for (int i = 0; i < P::slots; ++i) barrier_init(base + L::empty + i * 8, 4);  // the warps of a group
    barrier_init(base + L::in_ready, 1);
    barrier_init(base + L::core_ready, 1);
    barrier_init(base + L::out_ready, 1);
    barrier_init_done();
  }
  for (int i = int(threadIdx.x); i < kChannels; i += L::threads) store_shared(base + bias_place(i), arguments.bias[i]);
  __syncthreads();
  if (warp >= P::groups * 4) {
    if constexpr (P::groups > 1) give_registers<24>();
    if (warp == P::groups * 4 && lane == 0) produce<P>(base, arguments.maps, arguments.tiles);
  } else {
    if constexpr (P::groups > 1) take_registers<L::registers>();
    const int group = warp / 4;
    Consumer<P> consumer{arguments.maps,
                         arguments.out,
                         arguments.store_anyway,
                         base,
                         group,
                         warp % 4,
                         lane,
                         base + L::hidden + group * L::hidden_bytes,
                         warp % 4 == 0 && lane == 0,
                         {}};
    consumer.run(arguments.in_factor, arguments.tiles, arguments.profile);
  }
}

}  // namespace hopper::tucker
