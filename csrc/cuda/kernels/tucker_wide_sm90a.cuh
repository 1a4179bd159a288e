// The fused Tucker-2 block on Hopper for ranks of at most 128, and for factors that do not fit into shared memory: all
// three factors stream through one ring of slots, and two warpgroups with a tile each read every block of it.
//
// A CTA stays on its multiprocessor and computes the tiles blockIdx.x, blockIdx.x + gridDim.x, ..., two at a time. A
// tile is 8x8 pixels of the output (the 64 rows of a wgmma); with a 3x3 core and ranks of two parts of 64:
//
//   input: 10x10 pixels (halo), S channels          stage 1    hidden: 10x10 pixels, R1 ranks        stage 2
//   slices [100 of 104 pixels][64 channels]        -------->   parts [104 rows][64] in shared       -------->
//                                                 in_factor    memory                                 core
//   second: 8x8 pixels, R2 ranks                    stage 3    out: 8x8 pixels, chunks of 64 channels
//   in registers, as operand A                     -------->   staged over the hidden tile, stored by TMA
//                                                 out_factor
//
// The blocks of a turn (two tiles), in the order of their use:
//
//   for each plane (one, or those of a stride: tucker_sm90a.cuh draws them):
//     for each slice of S             in_factor   [128 ranks of R1][64 channels]
//     for each tap, each part of R1   core        [128 ranks of R2][64 ranks of R1]
//   for each chunk of T               out_factor  parts of R2 [64 channels][64 ranks]
//
// As in tucker_sm90a.cuh, stage 1 computes the transpose, 64 ranks x 104 pixels per part, and stage 2 reads its taps
// out of the hidden tile. All matrices have rows of 128 bytes in the 128-byte swizzle; elements outside of a tensor
// arrive as zeros.
//
//   warpgroups 0, 1    every other tile of the CTA, all three stages; a group without a tile in the last turn only
//                      gives the blocks back
//   warpgroup 2        one thread: all copies to shared memory
//
// Shared memory (tucker_wide_sm90a.h), from the bottom: barriers, bias | per group a hidden tile, over which two chunks
// of the output are staged later | per group a ring of slices of the input | the ring of blocks of the factors.
//
// Barriers, two per slot of each ring (from whom -> to whom):
//
//   full     a slice has arrived                            producer -> group
//            a block has arrived                            producer -> both groups
//   empty    the 4 warps of the group are done with it      group -> producer
//            the 8 warps of both groups are done with it    both groups -> producer
#pragma once

#include "cuda/kernels/hopper_tucker.cuh"
#include "plan/gpu/tucker_wide_sm90a.h"

namespace lowrank_ops::hopper {

using WideParams = TuckerParamsOf<TuckerWideSm90a>;

LOWRANK_OPS_HOPPER Ring block_ring(uint32_t base, const TuckerWideSm90a& l) {
  return {base, base + l.ring, l.slots, l.slot_bytes};
}
LOWRANK_OPS_HOPPER Ring slice_ring(uint32_t base, const TuckerWideSm90a& l, int group) {
  using L = TuckerWideSm90a;
  return {base + (L::kMostSlots + group * kMaxStages) * 16, base + l.inputs + group * l.input_slots * L::kSliceBytes,
          l.input_slots, L::kSliceBytes};
}
static_assert((TuckerWideSm90a::kMostSlots + TuckerWideSm90a::kGroups * kMaxStages) * 16 <=
                  TuckerWideSm90a::kBarrierBytes,
              "barriers");

// ---- The thread that copies

template <bool one_plane>
struct WideProducer {
  const WideParams& p;
  uint32_t base;
  RingPlace block, slice;  // `slice` serves both groups' rings: only in the last turn may the second group have none

  // Copies the input's slices of a plane, each after the block of in_factor that it is multiplied by.
  LOWRANK_OPS_HOPPER void load_inputs(int tile, int plane) {
    const Ring blocks = block_ring(base, p.layout);
#pragma unroll 1
    for (int s = 0; s < p.layout.slices; ++s) {
      open_slot(blocks, block, p.layout.r1_parts * TuckerWideSm90a::kPartBytes);
      load_box(blocks.at(block.slot), &p.in_factor, blocks.full(block.slot), s * TuckerWideSm90a::kSlice, 0);
      block.next(p.layout.slots);
#pragma unroll 1
      for (int group = 0; group < TuckerWideSm90a::kGroups; ++group) {
        const int own = tile + group * int(gridDim.x);
        if (own >= p.tiles.count) break;
        const Ring slices = slice_ring(base, p.layout, group);
        const ClassPlace place = p.tiles.place<one_plane>(own);
        const int number = place.residue * p.plane_count + plane;
        const Plane& from = p.planes[number];
        open_slot(slices, slice, from.bytes);
        load_box(slices.at(slice.slot), &p.input[number], slices.full(slice.slot), s * TuckerWideSm90a::kSlice,
                 place.at.x + from.columns.shift, place.at.y + from.rows.shift, place.at.n);
      }
      slice.next(p.layout.input_slots);
    }
  }

  LOWRANK_OPS_HOPPER void load_core(const Plane& plane) {
    const Ring blocks = block_ring(base, p.layout);
#pragma unroll 1
    for (int y = 0; y < plane.rows.taps; ++y)
#pragma unroll 1
      for (int x = 0; x < plane.columns.taps; ++x)
#pragma unroll 1
        for (int part = 0; part < p.layout.r1_parts; ++part) {
          open_slot(blocks, block, p.layout.r2_parts * TuckerWideSm90a::kPartBytes);
          load_box(blocks.at(block.slot), &p.core, blocks.full(block.slot), part * TuckerWideSm90a::kSlice,
                   plane.tap_x + x * p.stride_w, plane.tap_y + y * p.stride_h, 0);
          block.next(p.layout.slots);
        }
  }

  LOWRANK_OPS_HOPPER void load_out_factor() {
    const Ring blocks = block_ring(base, p.layout);
#pragma unroll 1
    for (int chunk = 0; chunk < p.layout.chunks; ++chunk) {
      open_slot(blocks, block, p.layout.r2_parts * TuckerWideSm90a::kPartBytes);
      for (int part = 0; part < p.layout.r2_parts; ++part)
        load_box(blocks.at(block.slot) + part * TuckerWideSm90a::kPartBytes, &p.out_factor, blocks.full(block.slot),
                 part * TuckerWideSm90a::kSlice, chunk * TuckerWideSm90a::kSlice);
      block.next(p.layout.slots);
    }
  }

  LOWRANK_OPS_HOPPER void run() {
#pragma unroll 1
    for (int tile = int(blockIdx.x); tile < p.tiles.count; tile += TuckerWideSm90a::kGroups * int(gridDim.x)) {
#pragma unroll 1
      for (int plane = 0; plane < (one_plane ? 1 : p.plane_count); ++plane) {
        load_inputs(tile, plane);
        load_core(p.planes[plane]);
      }
      load_out_factor();
    }
  }
};

// ---- The threads that compute

// A thread of warpgroup `group`; `half`: fp16, else bf16; parts of the ranks as in TuckerWideSm90a; `one_plane`: the
// call has no other planes, so that no sums have to be kept during stage 1.
template <bool half, int r1_parts, int r2_parts, bool one_plane>
struct WideGroup {
  using L = TuckerWideSm90a;
  static constexpr int kSteps = 4 * r2_parts;  // steps of stage 3's inner products

  const WideParams& p;
  uint32_t base;
  int group, warp, lane;
  uint32_t hidden;
  RingReader blocks, slices;

  LOWRANK_OPS_HOPPER WideGroup(const WideParams& params, uint32_t shared, int warp_of_cta, int lane_of_warp)
      : p(params),
        base(shared),
        group(warp_of_cta / 4),
        warp(warp_of_cta % 4),
        lane(lane_of_warp),
        hidden(shared + params.layout.hidden + warp_of_cta / 4 * params.layout.hidden_bytes()),
        blocks{block_ring(shared, params.layout), {}, {}},
        slices{slice_ring(shared, params.layout, warp_of_cta / 4), {}, {}} {}

  LOWRANK_OPS_HOPPER bool first_thread() const { return warp == 0 && lane == 0; }

  // Stage 1: hidden' [64 ranks of each part, halo pixels] = in_factor input' (' is the transpose). A slot is given back
  // when its products are done, which is awaited after those of the next slice have been issued.
  LOWRANK_OPS_HOPPER void stage1(float (&sums)[r1_parts][L::kRows / 2]) {
#pragma unroll
    for (int part = 0; part < r1_parts; ++part) {
#pragma unroll
      for (int j = 0; j < L::kRows / 2; ++j) sums[part][j] = 0;
      pin(sums[part]);
    }
#pragma unroll 1
    for (int s = 0; s < p.layout.slices; ++s) {
      const uint64_t ranks = swizzled(blocks.wait(), 1024), pixels = swizzled(slices.wait(), 1024);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int part = 0; part < r1_parts; ++part)
          wgmma<half>(sums[part], further(ranks, part * L::kPartBytes + k * 32), further(pixels, k * 32));
      wgmma_commit();
      if (s > 0) {
        wgmma_wait<1>();
        blocks.release(lane);
        slices.release(lane);
      }
    }
    wgmma_wait<0>();
    blocks.release(lane);
    slices.release(lane);
#pragma unroll
    for (int part = 0; part < r1_parts; ++part) pin(sums[part]);
  }

  LOWRANK_OPS_HOPPER void store_hidden(const float (&sums)[r1_parts][L::kRows / 2]) {
    if (first_thread()) wait_stores_read<0>();
    group_barrier(group);  // all warps have read the previous hidden tile, TMA the chunks staged over it
#pragma unroll
    for (int part = 0; part < r1_parts; ++part)
      store_ranks<half, L::kRows>(hidden + part * L::kSliceBytes, sums[part], warp, lane);
    fence_proxy();
    group_barrier(group);
  }

  // Stage 2: each tap of the plane multiplies a window of the hidden tile.
  LOWRANK_OPS_HOPPER void stage2(float (&sums)[32 * r2_parts], const Plane& plane) {
    const int line_bytes = plane.columns.halo * L::kRowBytes;
    pin(sums);
    uint64_t line = swizzled(hidden, uint32_t(line_bytes));
    bool first = true;
#pragma unroll 1
    for (int y = 0; y < plane.rows.taps; ++y) {
      uint64_t pixels = line;
#pragma unroll 1
      for (int x = 0; x < plane.columns.taps; ++x) {
#pragma unroll
        for (int part = 0; part < r1_parts; ++part) {
          const uint64_t core = swizzled(blocks.wait(), 1024);
          wgmma_fence();
#pragma unroll
          for (int k = 0; k < 4; ++k)
            wgmma<half>(sums, further(pixels, part * L::kSliceBytes + k * 32), further(core, k * 32));
          wgmma_commit();
          if (!first) {
            wgmma_wait<1>();
            blocks.release(lane);
          }
          first = false;
        }
        pixels = further(pixels, L::kRowBytes);
      }
      line = further(line, line_bytes);
    }
    wgmma_wait<0>();
    blocks.release(lane);
    pin(sums);
  }

  // Stages 1 and 2, plane by plane. The rounded sums are operand A of stage 3.
  LOWRANK_OPS_HOPPER void stages_of_planes(uint32_t (&second)[kSteps][4]) {
    float sums[32 * r2_parts];
#pragma unroll
    for (int j = 0; j < 32 * r2_parts; ++j) sums[j] = 0;
#pragma unroll 1
    for (int plane = 0; plane < (one_plane ? 1 : p.plane_count); ++plane) {
      {
        float hidden_sums[r1_parts][L::kRows / 2];
        stage1(hidden_sums);
        store_hidden(hidden_sums);
      }
      stage2(sums, p.planes[plane]);
    }
#pragma unroll
    for (int j = 0; j < 4 * kSteps; ++j) second[j / 4][j % 4] = pack<half>(sums[2 * j], sums[2 * j + 1]);
  }

  // Stage 3: a chunk of 64 channels.
  LOWRANK_OPS_HOPPER void multiply(float (&sums)[32], uint32_t (&second)[kSteps][4], int chunk) {
    start_with_bias(sums, base + p.layout.bias + chunk * L::kSlice * 4, lane);
    const uint64_t factor = swizzled(blocks.wait(), 1024);
    pin(sums);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) wgmma<half>(sums, second[k], further(factor, k / 4 * L::kPartBytes + k % 4 * 32));
    wgmma_commit();
    wgmma_wait<0>();
    blocks.release(lane);
    pin(sums);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) pin(second[k]);
  }

  LOWRANK_OPS_HOPPER void compute(const ClassPlace& place) {
    uint32_t second[kSteps][4];
    stages_of_planes(second);
#pragma unroll 1
    for (int chunk = 0; chunk < p.layout.chunks; ++chunk) {
      float sums[32];
      multiply(sums, second, chunk);
      activate(sums, p.activation);
      store_chunk<half>(&p.output[place.residue], hidden, sums, chunk, place.at, group, warp, lane);
    }
  }

  // A turn without a tile. Each block is given back only after it has arrived: otherwise `empty` could count two uses
  // of a slot as one.
  LOWRANK_OPS_HOPPER void skip() {
#pragma unroll 1
    for (int block = 0; block < p.layout.blocks(p.taps, one_plane ? 1 : p.plane_count); ++block) {
      blocks.wait();
      blocks.release(lane);
    }
  }

  LOWRANK_OPS_HOPPER void run() {
#pragma unroll 1
    for (int first = int(blockIdx.x); first < p.tiles.count; first += L::kGroups * int(gridDim.x)) {
      const int tile = first + group * int(gridDim.x);
      if (tile < p.tiles.count)
        compute(p.tiles.place<one_plane>(tile));
      else
        skip();
    }
    if (first_thread()) wait_stores();
  }
};

template <bool half, int r1_parts, int r2_parts, bool one_plane>
__global__ void __launch_bounds__(TuckerWideSm90a::kThreads, 1)
    tucker_wide_sm90a_kernel(const __grid_constant__ WideParams params) {
  using L = TuckerWideSm90a;
  constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  const uint32_t base = shared_base();
  const int warp = __shfl_sync(~0u, int(threadIdx.x) / 32, 0), lane = int(threadIdx.x) % 32;
  if (threadIdx.x == 0) {
    block_ring(base, params.layout).init(4 * L::kGroups);
    for (int group = 0; group < L::kGroups; ++group) slice_ring(base, params.layout, group).init(4);
    barrier_init_done();
  }
  store_bias<half>(params, base);
  __syncthreads();
  if (warp >= 4 * L::kGroups) {
    give_registers<kProducerRegisters>();
    if (warp == 4 * L::kGroups && lane == 0) WideProducer<one_plane>{params, base, {}, {}}.run();
  } else {
    take_registers<kConsumerRegisters>();
    WideGroup<half, r1_parts, r2_parts, one_plane>(params, base, warp, lane).run();
  }
}

}  // namespace lowrank_ops::hopper
