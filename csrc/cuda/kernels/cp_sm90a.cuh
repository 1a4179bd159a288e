// The fused CP block on Hopper: TMA copies boxes of the input and parts of the factors to shared memory; from there two
// warpgroups multiply and compute the depthwise stages.
//
// A CTA stays on its multiprocessor and computes the tiles blockIdx.x, blockIdx.x + gridDim.x, ... A tile is 14x8
// pixels of the output. Its ranks are computed in parts of 64:
//
//   input: 16x10 pixels (halo), S channels           stage 1     hidden: 16x10 pixels, 64 ranks    depthwise
//   slices [160 pixels][64 channels], for all       -------->    [160 rows of 144 bytes] in       --------->
//   parts of the tile                               in_factor    shared memory, two in turn        down, across
//   second: 14x8 pixels, 64 ranks                    stage 3     sums: 14x8 pixels, T channels, in registers, stored
//   in registers, as operand A                      -------->    after the last part
//                                                  out_factor
//
// Stage 1 computes the transpose, ranks x pixels = [64, S] [S, 80] per warpgroup. The depthwise stage (stage 2) reads
// hidden pixels of both warpgroups, so both meet at a barrier before it. While it runs, the tensor cores compute stage
// 1 of the next part and stage 3 of the part before.
//
// With clusters of two CTAs (`cluster`) both compute neighbouring tiles at the same time. Each copies half of the rows
// of every part of a factor, into the rings of both; the input's slices are each CTA's own. Where the number of tiles
// is odd the last cluster has one tile beyond the images: its input is zeros, and nothing of it is stored.
//
// With a dilation a tile's pixels lie some steps apart, on a lattice of the output, and so does their halo in the input
// (plan/gpu/planes.h). With a stride of 2 along an axis a tile has half as many pixels along it, so that its halo fits
// into the same shared memory: 7x8, 14x4 or 8x4 pixels, whose halo has 15x10, 16x9 or 17x9. The hidden tile keeps its
// 160 rows, of which the last are then not read, and the sums of the other rows of a wgmma are not stored. Calls with
// one class of the output whose windows begin at every pixel of it are compiled on their own (`plain`).
//
//   warpgroup 0   stage 1 of halo pixels 0 to 79, then the output's rows 0 to 7, two per warp (one per warp with a
//                 stride of the height)
//   warpgroup 1   halo pixels 80 to 159, rows 8 to 13 (its last warp has none)
//   warpgroup 2   one thread: all copies to shared memory
//
// Shared memory (cp_sm90a.h), from the bottom:
//
//   input     slices [160 pixels][64 channels] in the 128-byte swizzle, of one tile
//   ring      slots through which both factors stream anew for every tile; a slot holds a part of the ranks, of
//             in_factor [slices][64 ranks][64 channels] or of out_factor [T][64 ranks], in the same swizzle
//   hidden    2 tiles [160 pixels][64 ranks] in rows of 128 + 16 bytes, free of bank conflicts. The 16 bytes behind
//             the first tile's rows hold the barriers, one per row; those of the second tile the bias, 4 channels each
//   weights   12 floats per pair of ranks: 3 taps down, 3 across
//
// Barriers:
//
//   full[slot]          a part has arrived in the slot of the ring, from both CTAs of a cluster
//   empty[slot]         all 8 warps of every CTA of the cluster are done with the part in the slot
//   slice_full[slice]   a slice of the tile's input has arrived
//   input_free          all 8 warps have finished their last stage 1 of the tile
//
// A cluster's CTAs meet behind the initialization of the barriers, and at the end: none leaves while another may still
// copy to it or arrive at its barriers.
#pragma once

#include "cuda/kernels/cp_sm90a_depthwise.cuh"
#include "cuda/kernels/hopper_tiles.cuh"
#include "plan/gpu/planes.h"

namespace lowrank_ops::hopper {

struct CpParams {
  CUtensorMap input[kMostPlanes];  // [N, H, W, S] of a residue class, boxes of a halo x 64 channels
  CUtensorMap in_factor;           // [R, S], boxes of a CTA's share of 64 rows, x 64
  CUtensorMap out_factor;          // [T, R], the same, the rows in another order (cp_sm90a_launch.cuh)
  const uint16_t *down, *across;   // [R, 3], with the strides below, in elements
  int64_t down_rank, down_tap, across_rank, across_tap;
  const uint16_t* bias;  // [T] or null
  uint16_t* output;      // [N, OH, OW, T], dense
  CpSm90a layout;
  Tiles tiles;
  int cluster;                 // CTAs of a cluster: 1 or 2. `tiles.count` is a multiple of it
  int t, r, n, height, width;  // T, R, and the size of the output
  struct {
    int y, x;
  } shift[kMostPlanes];    // per class: the pixel of its plane that its first output reads first
  int stride_h, stride_w;  // in pixels of a plane: 1 or 2
  int halo_width, box_bytes;
  Activation activation;
};

// Addresses of the barriers, which lie in the padding of the first hidden tile's rows.
struct CpBarriers {
  static constexpr int kMostSlices = CpSm90a::kMostChannels / CpSm90a::kSlice;
  uint32_t first;

  LOWRANK_OPS_HOPPER uint32_t at(int row) const { return first + row * CpSm90a::kPitch; }
  LOWRANK_OPS_HOPPER uint32_t full(int slot) const { return at(slot); }
  LOWRANK_OPS_HOPPER uint32_t empty(int slot) const { return at(kMaxStages + slot); }
  LOWRANK_OPS_HOPPER uint32_t slice_full(int slice) const { return at(2 * kMaxStages + slice); }
  LOWRANK_OPS_HOPPER uint32_t input_free() const { return at(2 * kMaxStages + kMostSlices); }

  LOWRANK_OPS_HOPPER void init(const CpSm90a& layout, int cluster) const {
    for (int i = 0; i < layout.slots; ++i) {
      barrier_init(full(i), 1);
      barrier_init(empty(i), 8 * cluster);  // the warps of both groups
    }
    for (int i = 0; i < layout.slices; ++i) barrier_init(slice_full(i), 1);
    barrier_init(input_free(), 8);
    barrier_init_done();
  }
};

LOWRANK_OPS_HOPPER uint32_t bias_place(uint32_t base, const CpSm90a& l, int channel) {
  return base + l.hidden + CpSm90a::kHiddenBytes + CpSm90a::kRowBytes + channel / 4 * CpSm90a::kPitch + channel % 4 * 4;
}

// ---- The thread that copies

// The parts of a tile's factors go through the ring in the order of their use: parts 0 and 1 of in_factor, part 0 of
// out_factor, part 2 of in_factor, part 1 of out_factor, ..., the last two of out_factor.
template <bool plain>
struct CpProducer {
  const CpParams& p;
  ClusterPlace cluster;
  uint32_t base;
  CpBarriers barriers;
  RingPlace ring;

  LOWRANK_OPS_HOPPER void load_part(bool in, int part) {
    const uint32_t full = barriers.full(ring.slot), to = base + p.layout.ring + ring.slot * p.layout.slot_bytes;
    wait_phase(barriers.empty(ring.slot), ring.parity ^ 1);
    const int blocks = in ? p.layout.slices : p.layout.channels / CpSm90a::kSlice;
    barrier_expect(full, uint32_t(blocks * CpSm90a::kBlockBytes));
    const int first = cluster.first_of(CpSm90a::kSlice);
#pragma unroll 2
    for (int b = 0; b < blocks; ++b) {
      const uint32_t share = to + b * CpSm90a::kBlockBytes + first * CpSm90a::kRowBytes;
      const int column = (in ? b : part) * CpSm90a::kSlice;
      if (in)
        cluster.load(share, &p.in_factor, full, column, part * CpSm90a::kSlice + first);
      else
        cluster.load(share, &p.out_factor, full, column, 0, 0, 0, b * 2 + cluster.rank);
    }
    ring.next(p.layout.slots);
  }

  // Loads the tile's input and, after its first slice, the first part of in_factor.
  LOWRANK_OPS_HOPPER void load_input(const ClassPlace& place) {
    const int x = place.at.x * (plain ? 1 : p.stride_w) + p.shift[place.residue].x;
    const int y = place.at.y * (plain ? 1 : p.stride_h) + p.shift[place.residue].y;
    for (int s = 0; s < p.layout.slices; ++s) {
      const uint32_t full = barriers.slice_full(s);
      barrier_expect(full, uint32_t(plain ? CpSm90a::kSliceBytes : p.box_bytes));
      load_box(base + s * CpSm90a::kSliceBytes, &p.input[place.residue], full, s * CpSm90a::kSlice, x, y, place.at.n);
      if (s == 0) load_part(true, 0);
    }
  }

  LOWRANK_OPS_HOPPER void run() {
    uint32_t parity = 1;
#pragma unroll 1
    for (int tile = int(blockIdx.x); tile < p.tiles.count; tile += int(gridDim.x), parity ^= 1) {
      wait_phase(barriers.input_free(), parity);
      load_input(p.tiles.place<plain>(tile));
#pragma unroll 1
      for (int part = 0; part < p.layout.parts; ++part) {
        if (part + 1 < p.layout.parts) load_part(true, part + 1);
        load_part(false, part);
      }
    }
  }
};

// ---- The threads that compute

// A thread of a warpgroup that computes; `half`: fp16, else bf16; `channels` and `slices` as in CpSm90a.
template <bool half, int channels, int slices, bool plain>
struct CpGroup {
  const CpParams& p;
  uint32_t base;
  CpBarriers barriers;
  int group, warp, lane;
  int row;         // the first of the warp's rows of the output tile
  bool inside;     // whether these rows lie inside the tile: false in the last warp, except for tiles of 8x4
  RingPlace ring;  // of the next part to wait for
  RingPlace done;  // of the next part to give back; parts are given back in the order in which they were waited for

  LOWRANK_OPS_HOPPER CpGroup(const CpParams& params, uint32_t shared, const CpBarriers& shared_barriers,
                             int warp_of_cta, int lane_of_warp)
      : p(params),
        base(shared),
        barriers(shared_barriers),
        group(warp_of_cta / 4),
        warp(warp_of_cta % 4),
        lane(lane_of_warp),
        row(warp_of_cta * (plain || params.stride_h == 1 ? 2 : 1)),
        inside(row < (plain ? CpSm90a::kTileHeight : params.tiles.height)) {}

  // Waits for the next part and returns its address.
  LOWRANK_OPS_HOPPER uint32_t wait_part() {
    const uint32_t at = base + p.layout.ring + ring.slot * p.layout.slot_bytes;
    wait_phase(barriers.full(ring.slot), ring.parity);
    __syncwarp();
    ring.next(p.layout.slots);
    return at;
  }
  LOWRANK_OPS_HOPPER void release_part() {
    release_to(p.cluster, barriers.empty(done.slot), lane);
    done.next(p.layout.slots);
  }

  // Sets the sums to the bias. So that a lane can store 8 neighbouring channels, the rows of out_factor are permuted
  // within 32 (cp_sm90a_launch.cuh): a lane's sum 16 b + 4 j + e (+ 2 for its second row) is channel 32 b + 8 (lane %
  // 4) + 2 j + e.
  LOWRANK_OPS_HOPPER void start_with_bias(float (&sums)[channels / 2]) {
    const uint32_t first = bias_place(base, p.layout, lane % 4 * 8);
#pragma unroll
    for (int b = 0; b < channels / 32; ++b) {
      float values[8];
      const uint32_t from = first + b * 32 / 4 * CpSm90a::kPitch;
      load_shared(from, values[0], values[1], values[2], values[3]);
      load_shared(from + CpSm90a::kPitch, values[4], values[5], values[6], values[7]);
#pragma unroll
      for (int i = 0; i < 16; ++i) sums[b * 16 + i] = values[i / 4 * 2 + i % 2];
    }
    pin(sums);
  }

  // Issues hidden' [64 ranks of the part, the group's 80 halo pixels] = in_factor input'.
  LOWRANK_OPS_HOPPER void stage1(float (&hidden)[40], bool await_input, uint32_t parity) {
    constexpr int kGroupPixels = CpSm90a::kHaloPixels / 2;
#pragma unroll
    for (int i = 0; i < 40; ++i) hidden[i] = 0;
    pin(hidden);
    const uint64_t ranks = swizzled(wait_part(), 1024);
    const uint64_t pixels = swizzled(base + group * kGroupPixels * CpSm90a::kRowBytes, 1024);
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < slices; ++s) {
      if (await_input) {
        wait_phase(barriers.slice_full(s), parity);
        __syncwarp();
        wgmma_fence();
      }
#pragma unroll
      for (int k = 0; k < 4; ++k)
        wgmma<half>(hidden, further(ranks, s * CpSm90a::kBlockBytes + k * 32),
                    further(pixels, s * CpSm90a::kSliceBytes + k * 32));
    }
    wgmma_commit();
  }

  LOWRANK_OPS_HOPPER void store_hidden(uint32_t tile, const float (&hidden)[40]) {
    const uint32_t to = tile + (group * (CpSm90a::kHaloPixels / 2) + lane / 16 * 8 + lane % 8) * CpSm90a::kPitch +
                        (warp * 2 + lane / 8 % 2) * 16;
#pragma unroll
    for (int j = 0; j < 10; j += 2)
      store_matrices<true>(to + j * 8 * CpSm90a::kPitch, pack<half>(hidden[4 * j], hidden[4 * j + 1]),
                           pack<half>(hidden[4 * j + 2], hidden[4 * j + 3]),
                           pack<half>(hidden[4 * j + 4], hidden[4 * j + 5]),
                           pack<half>(hidden[4 * j + 6], hidden[4 * j + 7]));
  }

  // The depthwise stage: leaves its results in registers, as an operand of stage 3. Half of them are computed before
  // the wait for stage 3 of the part before, which still reads that operand.
  template <int rows>
  LOWRANK_OPS_HOPPER void stage2(uint32_t (&second)[4][4], uint32_t tile, int part) {
    const uint32_t line = (plain ? CpSm90a::kHaloWidth : p.halo_width) * CpSm90a::kPitch;
    // With a stride the upper half of the warp reads what the lower half reads, as the tile is half as wide.
    const int first = plain ? lane / 4 : lane / 4 * p.stride_w % CpSm90a::kTileWidth;
    const uint32_t pixels = tile + row * (plain ? 1 : p.stride_h) * line + first * CpSm90a::kPitch + lane % 4 * 4;
    const uint32_t weights = base + p.layout.weights + (part * 32 + lane % 4) * CpSm90a::kPairBytes;
    uint32_t early[4][2] = {};
    if (inside) {
#pragma unroll
      for (int column = 0; column < 4; ++column)
        depthwise<half, rows>(early[column], pixels + column * 16, line, weights + column * 4 * CpSm90a::kPairBytes);
    }
    wgmma_wait<1>();
#pragma unroll
    for (int k = 0; k < 4; ++k) pin(second[k]);
    if (part > 0) release_part();  // the part of out_factor that the part before has multiplied by
    if (!inside) return;
#pragma unroll
    for (int column = 0; column < 4; ++column)
#pragma unroll
      for (int lower = 0; lower < 2; ++lower) second[column / 2][column % 2 * 2 + lower] = early[column][lower];
#pragma unroll
    for (int column = 4; column < 8; ++column) {
      uint32_t results[2] = {};
      depthwise<half, rows>(results, pixels + column * 16, line, weights + column * 4 * CpSm90a::kPairBytes);
      second[column / 2][column % 2 * 2] = results[0];
      second[column / 2][column % 2 * 2 + 1] = results[1];
    }
  }

  // Issues sums += second out_factor' of the part's ranks.
  LOWRANK_OPS_HOPPER void stage3(float (&sums)[channels / 2], uint32_t (&second)[4][4]) {
    const uint64_t factor = swizzled(wait_part(), 1024);
#pragma unroll
    for (int k = 0; k < 4; ++k) pin(second[k]);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma<half>(sums, second[k], further(factor, k * 32));
    wgmma_commit();
  }

  LOWRANK_OPS_HOPPER void store(const float (&sums)[channels / 2], const ClassPlace& place) {
    const int step_y = plain ? 1 : p.tiles.classes_h.divisor, step_x = plain ? 1 : p.tiles.classes_w.divisor;
    const int y = (place.at.y + row) * step_y + place.class_y, x = (place.at.x + lane / 4) * step_x + place.class_x;
    if (!inside || place.at.n >= p.n || x >= p.width || (!plain && lane / 4 >= p.tiles.width)) return;
    uint16_t* const pixel = p.output + ((int64_t(place.at.n) * p.height + y) * p.width + x) * p.t + lane % 4 * 8;
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      if (y + lower * step_y >= p.height) return;
      if (!plain && lower == 1 && p.stride_h == 2) return;
#pragma unroll
      for (int b = 0; b < channels / 32; ++b) {
        if (b * 32 >= p.t) break;
        const float* of = sums + b * 16 + lower * 2;
        store_global(pixel + int64_t(lower) * step_y * p.width * p.t + b * 32, pack<half>(of[0], of[1]),
                     pack<half>(of[4], of[5]), pack<half>(of[8], of[9]), pack<half>(of[12], of[13]));
      }
    }
  }

  // Computes one tile. `turn`: which of the two hidden tiles is written next. They alternate across tiles, too: whoever
  // is behind the barrier of the next part knows that all warps have read the hidden tile of the part before.
  LOWRANK_OPS_HOPPER void compute(int number, uint32_t parity, int& turn) {
    float sums[channels / 2], hidden[40];
    start_with_bias(sums);
    uint32_t second[4][4] = {};
    stage1(hidden, true, parity);
    wgmma_wait<0>();
    pin(hidden);
    release_part();
    if (p.layout.parts == 1 && lane == 0) barrier_arrive(barriers.input_free());
#pragma unroll 1
    for (int part = 0; part < p.layout.parts; ++part, turn ^= 1) {
      const uint32_t tile = base + p.layout.hidden + turn * CpSm90a::kHiddenBytes;
      store_hidden(tile, hidden);
      both_groups_barrier();
      if (part + 1 < p.layout.parts)
        stage1(hidden, false, parity);
      else
        wgmma_commit();  // an empty group, so that wgmma_wait counts alike in all parts
      if (plain || p.stride_h == 1)
        stage2<2>(second, tile, part);
      else
        stage2<1>(second, tile, part);
      stage3(sums, second);
      wgmma_wait<1>();  // stage 1 of the next part
      pin(hidden);
      if (part + 1 < p.layout.parts) release_part();
      if (part + 2 == p.layout.parts && lane == 0) barrier_arrive(barriers.input_free());
    }
    wgmma_wait<0>();
#pragma unroll
    for (int k = 0; k < 4; ++k) pin(second[k]);
    release_part();  // the last part of out_factor
    pin(sums);
    activate(sums, p.activation);
    store(sums, p.tiles.place<plain>(number));
  }

  LOWRANK_OPS_HOPPER void run() {
    uint32_t parity = 0;
    int turn = 0;
#pragma unroll 1
    for (int tile = int(blockIdx.x); tile < p.tiles.count; tile += int(gridDim.x), parity ^= 1)
      compute(tile, parity, turn);
  }
};

template <bool half>
LOWRANK_OPS_HOPPER void store_constants(const CpParams& p, uint32_t base) {
  for (int i = int(threadIdx.x); i < p.layout.channels; i += CpSm90a::kThreads)
    store_shared(bias_place(base, p.layout, i), p.bias && i < p.t ? widen<half>(p.bias[i]) : 0);
  for (int i = int(threadIdx.x); i < p.layout.parts * CpSm90a::kSlice * CpSm90a::kTaps; i += CpSm90a::kThreads) {
    const int rank = i / CpSm90a::kTaps, tap = i % CpSm90a::kTaps;
    const uint32_t to = base + p.layout.weights + rank / 2 * CpSm90a::kPairBytes + tap * 8 + rank % 2 * 4;
    const bool exists = rank < p.r;
    store_shared(to, exists ? widen<half>(p.down[rank * p.down_rank + tap * p.down_tap]) : 0);
    store_shared(to + 24, exists ? widen<half>(p.across[rank * p.across_rank + tap * p.across_tap]) : 0);
  }
}

template <bool half, int channels, int slices, bool plain>
__global__ void __launch_bounds__(CpSm90a::kThreads, 1) cp_sm90a_kernel(const __grid_constant__ CpParams params) {
  constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  const uint32_t base = shared_base();
  const CpBarriers barriers{base + params.layout.hidden + CpSm90a::kRowBytes};
  const int warp = __shfl_sync(~0u, int(threadIdx.x) / 32, 0), lane = int(threadIdx.x) % 32;
  if (threadIdx.x == 0) barriers.init(params.layout, params.cluster);
  store_constants<half>(params, base);
  __syncthreads();
  cluster_barrier();
  if (warp >= 8) {
    give_registers<kProducerRegisters>();
    const ClusterPlace cluster{cluster_rank(), params.cluster};
    if (warp == 8 && lane == 0) CpProducer<plain>{params, cluster, base, barriers, {}}.run();
  } else {
    take_registers<kConsumerRegisters>();
    CpGroup<half, channels, slices, plain>(params, base, barriers, warp, lane).run();
  }
  cluster_barrier();
}

}  // namespace lowrank_ops::hopper
