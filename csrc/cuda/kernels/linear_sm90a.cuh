// The fused low-rank linear layer on Hopper for ranks of at most 256: input and factors stream through one ring of
// slots; the hidden rows never leave the registers.
//
// A CTA stays on its multiprocessor and takes the items blockIdx.x, blockIdx.x + gridDim.x, ... An item is a tile of
// 128 rows, and all or a share of its output channels (`splits` items have the same rows, and each computes stage 1):
//
//   input: 128 rows, S channels             stage 1    hidden: 128 rows, R ranks            stage 2
//   slices [128 rows][64 channels]         -------->   in registers, rounded, as operand   -------->
//                                          in_factor   A: per warpgroup [64 rows][R]       out_factor
//   out: 128 rows, chunks of 64 channels
//   staged in shared memory, stored by TMA
//
// The contents of the slots, in the order of their use, per item:
//
//   for each slice of S    input [128 rows][64 channels], in_factor [R, padded to 64, 128 or 256][64 channels]
//   for each chunk of T    out_factor, parts of R [64 channels][64 ranks]
//
// With clusters of two CTAs (`cluster`) both compute neighbouring tiles and the same share of the output channels, at
// the same time. Each copies half of the rows of every part of a factor, into both:
//
//   in_factor, out_factor --> CTA 0 copies the first half of the rows  --> slot of CTA 0 and slot of CTA 1
//                             CTA 1 copies the second half of the rows --> slot of CTA 0 and slot of CTA 1
//   input                 --> each CTA copies its own tile's
//
// Where the number of tiles is odd the last cluster has one tile beyond the rows: zeros, of which nothing is stored.
//
// All matrices have rows of 128 bytes in the 128-byte swizzle. Elements outside of a tensor (rows, channels, ranks)
// arrive as zeros and are not stored: the last tile may have any number of rows.
//
//   warpgroups 0, 1    rows 0 to 63, rows 64 to 127 of every tile, both stages
//   warpgroup 2        one thread: all copies to shared memory
//
// Shared memory (linear_sm90a.h), from the bottom: barriers | per group two chunks of the output | the ring.
//
// Barriers, two per slot (from whom -> to whom):
//
//   full     its contents have arrived, from both producers of a cluster   producers -> both groups
//   empty    the 8 warps of both groups of every CTA are done with it      groups of all CTAs -> producer of each
//
// A cluster's CTAs meet behind the initialization of the barriers, and at the end: none leaves while another may still
// copy to it or arrive at its barriers.
#pragma once

#include "cuda/kernels/hopper_tucker.cuh"  // stage_chunk
#include "plan/gpu/linear_sm90a.h"

namespace lowrank_ops::hopper {

struct LinearParams {
  CUtensorMap input;       // [rows, S], boxes 128 x 64
  CUtensorMap in_factor;   // [R, S], boxes of a CTA's share of all ranks, padded, x 64
  CUtensorMap out_factor;  // [T, R], boxes of a CTA's share of 64 rows, x 64
  CUtensorMap output;      // [1, 1, rows, T], boxes 64 rows x 64
  const uint32_t* bias;    // [T / 2] pairs of channels, or null
  LinearSm90a layout;
  Divider splits, cluster;  // cluster: the CTAs of one
  int items, t, share;      // items; output channels; chunks of them per item (the last split may have fewer)
  Activation activation;
};

// The first row of an item, and its chunks of output channels: `chunk` to `end` - 1. The items of a cluster's CTAs are
// neighbours: they have the same chunks.
struct LinearItem {
  int row, chunk, end;
};
LOWRANK_OPS_HOPPER LinearItem linear_item(const LinearParams& p, int item) {
  const int of_cluster = p.cluster.quotient(item), first = p.splits.quotient(of_cluster);
  const int tile = first * p.cluster.divisor + item - of_cluster * p.cluster.divisor;
  const int chunk = (of_cluster - first * p.splits.divisor) * p.share;
  return {tile * LinearSm90a::kRows, chunk, least(chunk + p.share, p.layout.chunks)};
}

LOWRANK_OPS_HOPPER Ring linear_ring(uint32_t base, const LinearSm90a& l) {
  return {base, base + l.ring, l.slots, l.slot_bytes};
}
static_assert(LinearSm90a::kMostSlots * 16 <= LinearSm90a::kBarrierBytes, "barriers");

// ---- The thread that copies

struct LinearProducer {
  const LinearParams& p;
  ClusterPlace cluster;
  Ring ring;
  RingPlace place;

  LOWRANK_OPS_HOPPER void run() {
    using L = LinearSm90a;
    const int block = p.layout.block_bytes();
    const int first_rank = cluster.first_of(p.layout.parts * L::kSlice), first = cluster.first_of(L::kSlice);
#pragma unroll 1
    for (int number = int(blockIdx.x); number < p.items; number += int(gridDim.x)) {
      const LinearItem item = linear_item(p, number);
#pragma unroll 1
      for (int s = 0; s < p.layout.slices; ++s, place.next(ring.slots)) {
        const uint32_t to = ring.at(place.slot), full = ring.full(place.slot);
        open_slot(ring, place, L::kInputBytes + block);
        load_box(to, &p.input, full, s * L::kSlice, item.row);
        cluster.load(to + L::kInputBytes + first_rank * L::kRowBytes, &p.in_factor, full, s * L::kSlice, first_rank);
      }
#pragma unroll 1
      for (int chunk = item.chunk; chunk < item.end; ++chunk, place.next(ring.slots)) {
        const uint32_t to = ring.at(place.slot), full = ring.full(place.slot);
        open_slot(ring, place, block);
#pragma unroll 1
        for (int part = 0; part < p.layout.parts; ++part)
          cluster.load(to + part * L::kPartBytes + first * L::kRowBytes, &p.out_factor, full, part * L::kSlice,
                       chunk * L::kSlice + first);
      }
    }
  }
};

// ---- The threads that compute

// A thread of warpgroup `group`; `half`: fp16, else bf16; `parts` as in LinearSm90a.
template <bool half, int parts>
struct LinearGroup {
  using L = LinearSm90a;
  static constexpr int kSteps = 4 * parts;  // steps of stage 2's inner products

  const LinearParams& p;
  int group, warp, lane;
  uint32_t staging;
  RingReader slots;
  int place = 0;  // of the next chunk in the staging buffer: 0 or 1

  LOWRANK_OPS_HOPPER LinearGroup(const LinearParams& params, uint32_t shared, int warp_of_cta, int lane_of_warp)
      : p(params),
        group(warp_of_cta / 4),
        warp(warp_of_cta % 4),
        lane(lane_of_warp),
        staging(shared + params.layout.staged + warp_of_cta / 4 * L::kStagedBytes),
        slots{linear_ring(shared, params.layout), {}, {}} {}

  LOWRANK_OPS_HOPPER bool first_thread() const { return warp == 0 && lane == 0; }
  LOWRANK_OPS_HOPPER void release() { slots.release(lane, p.cluster.divisor); }

  // Stage 1: hidden [64 rows, ranks] = input in_factor'. A slot is given back when its products are done, which is
  // awaited after those of the next slice have been issued. The rounded sums are operand A of stage 2.
  LOWRANK_OPS_HOPPER void stage1(uint32_t (&hidden)[kSteps][4]) {
    float sums[32 * parts];
#pragma unroll
    for (int j = 0; j < 32 * parts; ++j) sums[j] = 0;
    pin(sums);
#pragma unroll 1
    for (int s = 0; s < p.layout.slices; ++s) {
      const uint32_t at = slots.wait();
      const uint64_t rows = swizzled(at + group * L::kPartBytes, 1024), ranks = swizzled(at + L::kInputBytes, 1024);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) wgmma<half>(sums, further(rows, k * 32), further(ranks, k * 32));
      wgmma_commit();
      if (s > 0) {
        wgmma_wait<1>();
        release();
      }
    }
    wgmma_wait<0>();
    release();
    pin(sums);
#pragma unroll
    for (int j = 0; j < 4 * kSteps; ++j) hidden[j / 4][j % 4] = pack<half>(sums[2 * j], sums[2 * j + 1]);
  }

  // Sets the sums [64 rows, 64 channels] to the channels' bias: zeros beyond T, and where there is none.
  LOWRANK_OPS_HOPPER void start_with_channel_bias(float (&sums)[32], int chunk) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int channel = chunk * L::kSlice + j * 8 + lane % 4 * 2;
      const uint32_t both = p.bias && channel < p.t ? p.bias[channel / 2] : 0;
      sums[4 * j] = sums[4 * j + 2] = widen_low<half>(both);
      sums[4 * j + 1] = sums[4 * j + 3] = widen_high<half>(both);
    }
  }

  // Stage 2: a chunk of 64 channels.
  LOWRANK_OPS_HOPPER void multiply(float (&sums)[32], uint32_t (&hidden)[kSteps][4], int chunk) {
    start_with_channel_bias(sums, chunk);
    const uint64_t factor = swizzled(slots.wait(), 1024);
    pin(sums);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) wgmma<half>(sums, hidden[k], further(factor, k / 4 * L::kPartBytes + k % 4 * 32));
    wgmma_commit();
    wgmma_wait<0>();
    release();
    pin(sums);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) pin(hidden[k]);
  }

  // Writes a chunk of the group's rows: stages it, at one of two places in turn, from where TMA stores it. The group's
  // first thread has to wait for these stores before it ends.
  LOWRANK_OPS_HOPPER void store(const float (&values)[32], int row, int chunk) {
    const uint32_t staged = staging + place * L::kPartBytes;
    if (first_thread()) wait_stores_read<1>();
    group_barrier(group);  // TMA has read the chunk that was staged here
    stage_chunk<half>(staged, values, warp, lane);
    fence_proxy();
    group_barrier(group);
    if (first_thread()) {
      store_box(&p.output, staged, chunk * L::kSlice, row, 0, 0);
      commit_stores();
    }
    place ^= 1;
  }

  LOWRANK_OPS_HOPPER void run() {
#pragma unroll 1
    for (int number = int(blockIdx.x); number < p.items; number += int(gridDim.x)) {
      const LinearItem item = linear_item(p, number);
      uint32_t hidden[kSteps][4];
      stage1(hidden);
#pragma unroll 1
      for (int chunk = item.chunk; chunk < item.end; ++chunk) {
        float sums[32];
        multiply(sums, hidden, chunk);
        activate(sums, p.activation);
        store(sums, item.row + group * L::kGroupRows, chunk);
      }
    }
    if (first_thread()) wait_stores();
  }
};

template <bool half, int parts>
__global__ void __launch_bounds__(LinearSm90a::kThreads, 1)
    linear_sm90a_kernel(const __grid_constant__ LinearParams params) {
  using L = LinearSm90a;
  constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  const uint32_t base = shared_base();
  const int warp = __shfl_sync(~0u, int(threadIdx.x) / 32, 0), lane = int(threadIdx.x) % 32;
  if (threadIdx.x == 0) {
    linear_ring(base, params.layout).init(4 * L::kGroups * params.cluster.divisor);
    barrier_init_done();
  }
  cluster_barrier();
  if (warp >= 4 * L::kGroups) {
    give_registers<kProducerRegisters>();
    const ClusterPlace cluster{cluster_rank(), params.cluster.divisor};
    if (warp == 4 * L::kGroups && lane == 0)
      LinearProducer{params, cluster, linear_ring(base, params.layout), {}}.run();
  } else {
    take_registers<kConsumerRegisters>();
    LinearGroup<half, parts>(params, base, warp, lane).run();
  }
  cluster_barrier();
}

}  // namespace lowrank_ops::hopper
