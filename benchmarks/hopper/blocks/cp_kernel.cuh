// The fused CP kernel; cp_layout.cuh draws it.
#pragma once

#include "cp_layout.cuh"

namespace hopper::cp {

// The thread that copies.
template <class P>
struct Producer {
  const Maps& maps;
  uint32_t base;
  int slot = 0;
  uint32_t parity = 1;  // of the slot's emptying before

  DEVICE void load_block(bool in, int part) {
    const uint32_t full = base + kFullAt + slot * kPitch, to = base + kRingAt + slot * kBlockBytes;
    wait_phase(base + kEmptyAt + slot * kPitch, parity);
    barrier_expect(full, kBlockBytes);
    if (in) {
      for (int s = 0; s < kSlices; ++s) tma_load_2d(to + s * kFactorSlice, &maps.in_factor, full, s * 64, part * 64);
    } else {
      for (int b = 0; b < 4; ++b)
        tma_load_5d(to + b * kFactorSlice, &maps.out_factor_permuted, full, part * 64, 0, 0, 0, b * 2);
    }
    if (++slot == kBlocks) slot = 0, parity ^= 1;
  }

  // The tile's input, and behind its first slice the first block.
  DEVICE void load_input(int turn, const TilePlace& place) {
    for (int s = 0; s < kSlices; ++s) {
      const uint32_t full = base + kSliceFullAt + s * kPitch;
      if ((P::skip & kInput) && turn > 0) {
        barrier_arrive(full);
        continue;
      }
      barrier_expect(full, kSliceBytes);
      tma_load_4d(base + kInputAt + s * kSliceBytes, &maps.input, full, s * 64, place.x - 1, place.y - 1, place.n);
      if (s == 0) load_block(true, 0);
    }
    if ((P::skip & kInput) && turn > 0) load_block(true, 0);
  }

  DEVICE void run(int tiles) {
    int turn = 0;
#pragma unroll 1
    for (int tile = int(blockIdx.x); tile < tiles; tile += int(gridDim.x), ++turn) {
      wait_phase(base + kInputFreeAt, uint32_t(turn + 1) & 1);
      load_input(turn, tile_place(tile));
      if (P::prefetch && tile + int(gridDim.x) < tiles) {
        const TilePlace next = tile_place(tile + int(gridDim.x));
        for (int s = 0; s < kSlices; ++s) tma_prefetch_4d(&maps.input, s * 64, next.x - 1, next.y - 1, next.n);
      }
#pragma unroll 1
      for (int i = 1; i < 8; ++i) {
        const bool in = i == 1 || i == 3 || i == 5;
        load_block(in, i == 7 ? 3 : in ? (i + 1) / 2 : i / 2 - 1);
      }
    }
  }
};

DEVICE float low_half_of(uint32_t both) {
  return word_as_float(both << 16);
}
DEVICE float high_half_of(uint32_t both) {
  return word_as_float(both & 0xFFFF0000u);
}

// One 16-byte column of ranks (8, of which a lane has two) of a part: 3 taps down, rounded, and 3 across, for the
// lane's two pixels. `pixels` is the shared address of the first of the halo's 4x3 pixels that they need, of the lane's
// ranks of the column.
DEVICE void depthwise(uint32_t (&results)[2], uint32_t pixels, uint32_t weights) {
  float w[12];  // two ranks of each tap
#pragma unroll
  for (int i = 0; i < 3; ++i) load_shared(weights + i * 16, w[4 * i], w[4 * i + 1], w[4 * i + 2], w[4 * i + 3]);
  float sums[2][2] = {};
#pragma unroll
  for (int b = 0; b < 3; ++b) {
    uint32_t words[4];
#pragma unroll
    for (int a = 0; a < 4; ++a) words[a] = load_shared_word(pixels + (a * kHaloWidth + b) * kPitch);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float low = 0, high = 0;
#pragma unroll
      for (int tap = 0; tap < 3; ++tap) {
        low += w[2 * tap] * low_half_of(words[half + tap]);
        high += w[2 * tap + 1] * high_half_of(words[half + tap]);
      }
      const uint32_t both = pack(low, high);
      sums[half][0] += w[6 + 2 * b] * low_half_of(both);
      sums[half][1] += w[7 + 2 * b] * high_half_of(both);
    }
  }
  results[0] = pack(sums[0][0], sums[0][1]);
  results[1] = pack(sums[1][0], sums[1][1]);
}

// A thread of a warpgroup that computes. `first` is the number of the tile's first block of the ring.
template <class P>
struct Consumer {
  uint16_t* out;
  int store_anyway;
  uint32_t base;
  int group, warp, lane;
  int row;      // of the output tile, the first of the warp's two
  bool inside;  // which the last warp's are not

  DEVICE void wait_block(int block) {
    wait_phase(base + kFullAt + block % kBlocks * kPitch, uint32_t(block / kBlocks) & 1);
    __syncwarp();
  }
  DEVICE void release_block(int block) {
    if (lane == 0) barrier_arrive(base + kEmptyAt + block % kBlocks * kPitch);
  }
  DEVICE uint32_t block_at(int block) { return base + kRingAt + block % kBlocks * kBlockBytes; }

  DEVICE void start_with_bias(float (&sums)[128]) {
#pragma unroll
    for (int b = 0; b < 8; ++b) {
      float values[8];
      const uint32_t from = base + kBiasAt + (b * 8 + lane % 4 * 2) * kPitch;
      load_shared(from, values[0], values[1], values[2], values[3]);
      load_shared(from + kPitch, values[4], values[5], values[6], values[7]);
#pragma unroll
      for (int i = 0; i < 16; ++i) sums[b * 16 + i] = values[i / 4 * 2 + i % 2];
    }
    pin(sums);
  }

  // Issues hidden' [64 ranks of the part, the group's 80 halo pixels] = in_factor input'.
  DEVICE void stage1(float (&hidden)[40], int block, int turn, bool await_input) {
#pragma unroll
    for (int i = 0; i < 40; ++i) hidden[i] = 0;
    pin(hidden);
    wait_block(block);
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
      if (await_input) {
        wait_phase(base + kSliceFullAt + s * kPitch, uint32_t(turn) & 1);
        __syncwarp();
        wgmma_fence();
      }
      const uint64_t ranks = swizzled(block_at(block), 1024);
      const uint64_t pixels = swizzled(base + kInputAt + group * kGroupPixels * kRow, 1024);
#pragma unroll
      for (int k = 0; k < 4; ++k)
        wgmma(hidden, further(ranks, s * kFactorSlice + k * 32), further(pixels, s * kSliceBytes + k * 32));
    }
    wgmma_commit();
  }

  DEVICE void store_hidden(uint32_t tile, const float (&hidden)[40]) {
    const uint32_t to =
        tile + (group * kGroupPixels + lane / 16 * 8 + lane % 8) * kPitch + (warp * 2 + lane / 8 % 2) * 16;
#pragma unroll
    for (int j = 0; j < 10; j += 2)
      store_matrices<true>(to + j * 8 * kPitch, pack(hidden[4 * j], hidden[4 * j + 1]),
                           pack(hidden[4 * j + 2], hidden[4 * j + 3]), pack(hidden[4 * j + 4], hidden[4 * j + 5]),
                           pack(hidden[4 * j + 6], hidden[4 * j + 7]));
  }

  // One of the 8 columns of the depthwise stage.
  DEVICE void column_of(uint32_t (&results)[2], uint32_t pixels, uint32_t weights, int column) {
    if (P::skip & kDepthwise)
      results[0] = load_shared_word(pixels + column * 16), results[1] = load_shared_word(pixels + column * 16 + kPitch);
    else
      depthwise(results, pixels + column * 16, weights + column * 4 * kWeightBytes);
  }

  // The depthwise stage, to an operand in registers. Half of it precedes the wait for stage 3 of the part before, which
  // still reads that operand.
  DEVICE void stage2(uint32_t (&second)[4][4], uint32_t tile, int first, int part) {
    const uint32_t pixels = tile + (row * kHaloWidth + lane / 4) * kPitch + lane % 4 * 4;
    const uint32_t weights = base + kWeightsAt + (part * 32 + lane % 4) * kWeightBytes;
    uint32_t early[4][2] = {};
    if (inside) {
#pragma unroll
      for (int column = 0; column < 4; ++column) column_of(early[column], pixels, weights, column);
    }
    wgmma_wait<1>();
#pragma unroll
    for (int k = 0; k < 4; ++k) pin(second[k]);
    if (part > 0) release_block(first + out_place(part - 1));
    if (!inside) return;
#pragma unroll
    for (int column = 0; column < 4; ++column)
#pragma unroll
      for (int half = 0; half < 2; ++half) second[column / 2][column % 2 * 2 + half] = early[column][half];
#pragma unroll
    for (int column = 4; column < 8; ++column) {
      uint32_t results[2];
      column_of(results, pixels, weights, column);
      second[column / 2][column % 2 * 2] = results[0];
      second[column / 2][column % 2 * 2 + 1] = results[1];
    }
  }

  // Issues sums += second out_factor' of the part's ranks.
  DEVICE void stage3(float (&sums)[128], uint32_t (&second)[4][4], int block) {
    wait_block(block);
#pragma unroll
    for (int k = 0; k < 4; ++k) pin(second[k]);
    wgmma_fence();
    if constexpr (!(P::skip & kStage3)) {
#pragma unroll
      for (int k = 0; k < 4; ++k) wgmma(sums, second[k], further(swizzled(block_at(block), 1024), k * 32));
    }
    wgmma_commit();
  }

  DEVICE void store(const float (&sums)[128], const TilePlace& place) {
    uint16_t* const pixel =
        out + ((size_t(place.n) * kSize + place.y + row) * kSize + place.x + lane / 4) * kChannels + lane % 4 * 8;
    if (!inside || ((P::skip & kStore) && !store_anyway)) return;
#pragma unroll
    for (int b = 0; b < 8; ++b)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* of = sums + b * 16 + half * 2;
        store_global(pixel + b * 32 + half * kSize * kChannels, pack(of[0], of[1]), pack(of[4], of[5]),
                     pack(of[8], of[9]), pack(of[12], of[13]));
      }
  }

  DEVICE void compute(int turn, const TilePlace& place) {
    const int first = turn * 8;
    float sums[128], hidden[40];
    start_with_bias(sums);
    uint32_t second[4][4] = {};
    stage1(hidden, first + in_place(0), turn, true);
    wgmma_wait<0>();
    pin(hidden);
    release_block(first);
#pragma unroll 1
    for (int part = 0; part < kParts; ++part) {  // a loop: unrolled it is four times the code, and 3 us faster
      const uint32_t tile = base + kHiddenAt + part % 2 * kHiddenBytes;
      store_hidden(tile, hidden);
      both_barrier();
      if (part + 1 < kParts)
        stage1(hidden, first + in_place(part + 1), turn, false);
      else
        wgmma_commit();  // of nothing: what is pending is counted alike in all parts
      stage2(second, tile, first, part);
      stage3(sums, second, first + out_place(part));
      wgmma_wait<1>();  // stage 1 of the next part
      pin(hidden);
      if (part + 1 < kParts) release_block(first + in_place(part + 1));
      if (part + 2 == kParts && lane == 0) barrier_arrive(base + kInputFreeAt);
    }
    wgmma_wait<0>();
#pragma unroll
    for (int k = 0; k < 4; ++k) pin(second[k]);
    release_block(first + out_place(kParts - 1));
    pin(sums);
    store(sums, place);
  }

  DEVICE void run(int tiles) {
    int turn = 0;
#pragma unroll 1
    for (int tile = int(blockIdx.x); tile < tiles; tile += int(gridDim.x), ++turn) compute(turn, tile_place(tile));
  }
};

DEVICE void init_barriers(uint32_t base) {
  for (int i = 0; i < kBlocks; ++i) {
    barrier_init(base + kFullAt + i * kPitch, 1);
    barrier_init(base + kEmptyAt + i * kPitch, 8);  // the warps of both groups
  }
  for (int i = 0; i < kSlices; ++i) barrier_init(base + kSliceFullAt + i * kPitch, 1);
  barrier_init(base + kInputFreeAt, 8);
  barrier_init_done();
}

DEVICE void store_constants(uint32_t base, const uint16_t* down, const uint16_t* across, const float* bias) {
  for (int i = int(threadIdx.x); i < kChannels; i += kThreads)
    store_shared(base + kBiasAt + i / 4 * kPitch + i % 4 * 4, bias[i]);
  for (int i = int(threadIdx.x); i < kRank * 3; i += kThreads) {
    const int rank = i / 3, tap = i % 3;
    const uint32_t to = base + kWeightsAt + rank / 2 * kWeightBytes + tap * 8 + rank % 2 * 4;
    store_shared(to, word_as_float(uint32_t(down[i]) << 16));
    store_shared(to + 24, word_as_float(uint32_t(across[i]) << 16));
  }
}

template <class P>
__global__ void __launch_bounds__(kThreads, 1) cp_kernel(const __grid_constant__ Arguments arguments) {
  const uint32_t base = shared_base();
  const int warp = __shfl_sync(~0u, int(threadIdx.x) / 32, 0), lane = int(threadIdx.x) % 32;
  if (threadIdx.x == 0) init_barriers(base);
  store_constants(base, arguments.down, arguments.across, arguments.bias);
  __syncthreads();
  if (warp >= 8) {
    give_registers<24>();
    if (warp == 8 && lane == 0) Producer<P>{arguments.maps, base}.run(arguments.tiles);
  } else {
    take_registers<240>();
    const int row = warp / 4 * 8 + warp % 4 * 2;
    Consumer<P> consumer{arguments.out, arguments.store_anyway, base, warp / 4, warp % 4, lane, row, row < kTileHeight};
    consumer.run(arguments.tiles);
  }
}

}  // namespace hopper::cp
