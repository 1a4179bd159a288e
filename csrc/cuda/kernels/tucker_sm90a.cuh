// The fused Tucker-2 block on Hopper: TMA copies boxes of the input to shared memory, from where warpgroups multiply.
//
// A CTA stays on its multiprocessor and computes the tiles blockIdx.x, blockIdx.x + gridDim.x, ... A tile is 8x8 pixels
// of the output (the 64 rows of a wgmma); with a 3x3 core:
//
//   input: 10x10 pixels (halo), S channels          stage 1    hidden: 10x10 pixels, R1 ranks     stage 2
//   slices [100 of 104 pixels][64 channels]        -------->   [104 rows][64] in shared memory   -------->
//                                                  in_factor                                       core
//   second: 8x8 pixels, R2 ranks                    stage 3    out: 8x8 pixels, chunks of 64 channels
//   in registers, as operand A                     -------->   staged over the hidden tile, stored by TMA
//                                                 out_factor
//
// All matrices in shared memory have rows of 128 bytes in the 128-byte swizzle. Elements of a box that lie outside of
// the tensor (channels, ranks, pixels beyond a border) arrive as zeros. Stage 1 computes the transpose, ranks x pixels
// = [64, S] [S, 104], so that 100 pixels cost 104 columns and not 128 rows. Stage 2 reads its taps out of the hidden
// tile: the 8x8 pixels of a tap are 8 groups of 8 rows, which lie a halo's width apart.
//
// With a stride of 2 stages 1 and 2 run once per plane of the input (plan/gpu/planes.h): each plane's hidden tile takes
// the place of the former one's, stage 2 adds to the same sums. A 3x3 core has four planes, here with their taps:
//
//   0 1 0      plane 0: 9x9 pixels (halo)      plane 1: 9x8
//   2 3 2      plane 2: 8x9                    plane 3: 8x8
//   0 1 0
//
// With a dilation of 2 a tile's pixels lie two apart, on a lattice of the output, and so does their halo in the input,
// which is one plane. The planes of several lattices differ only in their tensor maps.
//
//   warpgroups 0, 1    every other tile of the CTA, all three stages
//   warpgroup 2        one thread: all copies to shared memory, for the groups alternately, a plane at a time
//
// Shared memory (tucker_sm90a.h), from the bottom: barriers, bias | per group a hidden tile, over which two chunks of
// the output are staged later | in_factor: slices [64 ranks][64 channels] | core: taps [R2][64 ranks], plane by plane |
// out_factor: parts [64 channels][64 ranks] | the ring: slots [104 pixels][64 channels].
//
// Barriers (from whom -> to whom; TMA completes a phase when all its bytes have arrived):
//
//   full[group][n]   slice number n, modulo slots, of the group has arrived   producer -> group
//   empty[slot]      the 4 warps of a group are done with the slot            group -> producer
//   in_ready, core_ready, out_ready   a factor has arrived, once              producer -> both groups
//
// Why `full` is not one barrier per slot: a wait names its phase by a parity only, so a waiting group may be at most
// one phase behind. Both groups share the slots. A group may come to a slot before the other group's slice, which uses
// the slot first, has arrived. The barrier's last complete phase would then have the parity that the group waits for,
// and the group would go on too early. A barrier of the group's own shows it every phase, and one per slot suffices, as
// no more slices can be on their way.
#pragma once

#include "cuda/kernels/hopper_tucker.cuh"
#include "plan/gpu/tucker_sm90a.h"

namespace lowrank_ops::hopper {

using TuckerParams = TuckerParamsOf<TuckerSm90a>;

// Addresses of the barriers.
struct Barriers {
  uint32_t base;

  LOWRANK_OPS_HOPPER uint32_t full(int group, int n) const { return base + (group * TuckerSm90a::kMostSlots + n) * 8; }
  LOWRANK_OPS_HOPPER uint32_t empty(int slot) const { return full(TuckerSm90a::kGroups, slot); }
  LOWRANK_OPS_HOPPER uint32_t in_ready() const { return full(TuckerSm90a::kGroups + 1, 0); }
  LOWRANK_OPS_HOPPER uint32_t core_ready() const { return in_ready() + 8; }
  LOWRANK_OPS_HOPPER uint32_t out_ready() const { return in_ready() + 16; }

  LOWRANK_OPS_HOPPER void init(int slots) const {
    for (int slot = 0; slot < slots; ++slot) {
      for (int group = 0; group < TuckerSm90a::kGroups; ++group) barrier_init(full(group, slot), 1);
      barrier_init(empty(slot), 4);  // the warps of a group
    }
    barrier_init(in_ready(), 1);
    barrier_init(core_ready(), 1);
    barrier_init(out_ready(), 1);
    barrier_init_done();
  }
};
static_assert(((TuckerSm90a::kGroups + 1) * TuckerSm90a::kMostSlots + 3) * 8 <= TuckerSm90a::kBarrierBytes, "barriers");

// ---- The thread that copies

LOWRANK_OPS_HOPPER void load_in_factor(const TuckerParams& p, uint32_t base, const Barriers& barriers) {
  barrier_expect(barriers.in_ready(), uint32_t(p.layout.slices * TuckerSm90a::kBlockBytes));
  for (int s = 0; s < p.layout.slices; ++s)
    load_box(base + p.layout.in_factor + s * TuckerSm90a::kBlockBytes, &p.in_factor, barriers.in_ready(),
             s * TuckerSm90a::kSlice, 0);
}

// Core and out_factor, which are needed later than the first tile.
LOWRANK_OPS_HOPPER void load_late_factors(const TuckerParams& p, uint32_t base, const Barriers& barriers) {
  const int tap_bytes = p.layout.ranks * TuckerSm90a::kRowBytes;
  barrier_expect(barriers.core_ready(), uint32_t(p.taps * tap_bytes));
  uint32_t to = base + p.layout.core;
  for (int i = 0; i < p.plane_count; ++i) {
    const Plane& plane = p.planes[i];
    for (int y = 0; y < plane.rows.taps; ++y)
      for (int x = 0; x < plane.columns.taps; ++x, to += tap_bytes)
        load_box(to, &p.core, barriers.core_ready(), 0, plane.tap_x + x * p.stride_w, plane.tap_y + y * p.stride_h, 0);
  }
  barrier_expect(barriers.out_ready(), uint32_t(p.layout.chunks * TuckerSm90a::kBlockBytes));
  for (int chunk = 0; chunk < p.layout.chunks; ++chunk)
    load_box(base + p.layout.out_factor + chunk * TuckerSm90a::kBlockBytes, &p.out_factor, barriers.out_ready(), 0,
             chunk * TuckerSm90a::kSlice);
}

// Copies all slices of the CTA's tiles, in the order in which the groups take them, and core and out_factor once the
// first slices are on their way.
template <bool one_plane>
struct Producer {
  const TuckerParams& p;
  uint32_t base;
  Barriers barriers;
  RingPlace ring, of_group[TuckerSm90a::kGroups];
  bool late;  // core and out_factor are still to come

  // The slices of a plane, for a tile of the group.
  LOWRANK_OPS_HOPPER void load_plane(int tile, int plane, int group) {
    const ClassPlace place = p.tiles.place<one_plane>(tile);
    const int number = place.residue * p.plane_count + plane;
    const Plane& from = p.planes[number];
    RingPlace arrival = group == 1 ? of_group[1] : of_group[0];
#pragma unroll 1
    for (int s = 0; s < p.layout.slices; ++s) {
      const uint32_t full = barriers.full(group, arrival.slot),
                     slot = base + p.layout.ring + ring.slot * p.layout.slice_bytes();
      wait_phase(barriers.empty(ring.slot), ring.parity ^ 1);
      barrier_expect(full, uint32_t(from.bytes));
      load_box(slot, &p.input[number], full, s * TuckerSm90a::kSlice, place.at.x + from.columns.shift,
               place.at.y + from.rows.shift, place.at.n);
      arrival.next(p.layout.slots);
      ring.next(p.layout.slots);
      if (late && (ring.slot == 0 || s + 1 == p.layout.slices)) {
        load_late_factors(p, base, barriers);
        late = false;
      }
    }
    (group == 1 ? of_group[1] : of_group[0]) = arrival;
  }

  LOWRANK_OPS_HOPPER void run() {
    load_in_factor(p, base, barriers);
#pragma unroll 1
    for (int first = int(blockIdx.x); first < p.tiles.count; first += TuckerSm90a::kGroups * int(gridDim.x))
#pragma unroll 1
      for (int plane = 0; plane < (one_plane ? 1 : p.plane_count); ++plane)
#pragma unroll 1
        for (int group = 0; group < TuckerSm90a::kGroups; ++group) {
          const int tile = first + group * int(gridDim.x);
          if (tile < p.tiles.count) load_plane(tile, plane, group);
        }
  }
};

// ---- The threads that compute

// A thread of warpgroup `group`; `half`: fp16, else bf16; `ranks` and `rows` as in TuckerSm90a; `one_plane`: the call
// has no other planes, so that no sums have to be kept during stage 1.
template <bool half, int ranks, int rows, bool one_plane>
struct TuckerGroup {
  static constexpr int kSteps = ranks / 16;  // steps of the inner products over ranks

  const TuckerParams& p;
  Barriers barriers;
  uint32_t base;
  int group, warp, lane;
  uint32_t hidden;
  RingPlace arrival;  // place of the group's next slice among its own barriers
  int slot;           // the slot of that slice

  LOWRANK_OPS_HOPPER TuckerGroup(const TuckerParams& params, uint32_t shared, const Barriers& shared_barriers,
                                 int warp_of_cta, int lane_of_warp)
      : p(params),
        barriers(shared_barriers),
        base(shared),
        group(warp_of_cta / 4),
        warp(warp_of_cta % 4),
        lane(lane_of_warp),
        hidden(shared + params.layout.hidden + warp_of_cta / 4 * params.layout.hidden_bytes()),
        slot(warp_of_cta / 4 == 0 ? 0 : params.layout.skip) {}

  LOWRANK_OPS_HOPPER bool first_thread() const { return warp == 0 && lane == 0; }

  // Stage 1: hidden' [64 ranks, halo pixels] = in_factor input' (' is the transpose). A slot is given back when its
  // products are done, which is awaited after those of the next slice have been issued. The next `skip` slots are the
  // other group's.
  LOWRANK_OPS_HOPPER void stage1(float (&sums)[rows / 2], int skip) {
#pragma unroll
    for (int j = 0; j < rows / 2; ++j) sums[j] = 0;
    pin(sums);
    uint32_t before = 0;
#pragma unroll 1
    for (int s = 0; s < p.layout.slices; ++s) {
      const uint32_t slice = base + p.layout.ring + slot * p.layout.slice_bytes();
      wait_phase(barriers.full(group, arrival.slot), arrival.parity);
      __syncwarp();
      const uint32_t factor = base + p.layout.in_factor + s * TuckerSm90a::kBlockBytes;
      const uint64_t a = swizzled(factor, 1024), b = swizzled(slice, 1024);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) wgmma<half>(sums, further(a, k * 32), further(b, k * 32));
      wgmma_commit();
      if (s > 0) {
        wgmma_wait<1>();
        if (lane == 0) barrier_arrive(before);
      }
      before = barriers.empty(slot);
      arrival.next(p.layout.slots);
      if (++slot == p.layout.slots) slot = 0;
    }
    slot += skip;
    if (slot >= p.layout.slots) slot -= p.layout.slots;
    wgmma_wait<0>();
    if (lane == 0) barrier_arrive(before);
    pin(sums);
  }

  LOWRANK_OPS_HOPPER void store_hidden(const float (&sums)[rows / 2]) {
    if (first_thread()) wait_stores_read<0>();
    group_barrier(group);  // all warps have read the previous hidden tile, TMA the chunks staged over it
    if (warp * 16 < ranks) store_ranks<half, rows>(hidden, sums, warp, lane);
    fence_proxy();
    group_barrier(group);
  }

  // Stage 2: each tap of the plane multiplies a window of the hidden tile. `core`: the plane's first tap; it becomes
  // that of the next plane.
  LOWRANK_OPS_HOPPER void stage2(float (&sums)[ranks / 2], const Plane& plane, uint64_t& core) {
    const int line_bytes = plane.columns.halo * TuckerSm90a::kRowBytes;
    pin(sums);
    wgmma_fence();
    uint64_t line = swizzled(hidden, uint32_t(line_bytes));
#pragma unroll 1
    for (int y = 0; y < plane.rows.taps; ++y) {
      uint64_t pixels = line;
#pragma unroll 1
      for (int x = 0; x < plane.columns.taps; ++x) {
#pragma unroll
        for (int k = 0; k < kSteps; ++k) wgmma<half>(sums, further(pixels, k * 32), further(core, k * 32));
        pixels = further(pixels, TuckerSm90a::kRowBytes);
        core = further(core, ranks * TuckerSm90a::kRowBytes);
      }
      line = further(line, line_bytes);
    }
    wgmma_commit();
    wgmma_wait<0>();
    pin(sums);
  }

  // Stages 1 and 2, plane by plane. The rounded sums are operand A of stage 3.
  LOWRANK_OPS_HOPPER void stages_of_planes(uint32_t (&second)[kSteps][4], bool first_tile, int skip) {
    float sums[ranks / 2];
#pragma unroll
    for (int j = 0; j < ranks / 2; ++j) sums[j] = 0;
    uint64_t core = swizzled(base + p.layout.core, 1024);
#pragma unroll 1
    for (int plane = 0; plane < (one_plane ? 1 : p.plane_count); ++plane) {
      {
        float hidden_sums[rows / 2];
        stage1(hidden_sums, skip);
        store_hidden(hidden_sums);
      }
      if (first_tile && plane == 0) wait_phase(barriers.core_ready(), 0);
      __syncwarp();
      stage2(sums, p.planes[plane], core);
    }
#pragma unroll
    for (int j = 0; j < 4 * kSteps; ++j) second[j / 4][j % 4] = pack<half>(sums[2 * j], sums[2 * j + 1]);
  }

  // Stage 3: the sums of a chunk of 64 channels start as the bias.
  LOWRANK_OPS_HOPPER void multiply(float (&sums)[32], uint32_t (&second)[kSteps][4], int chunk) {
    start_with_bias(sums, base + p.layout.bias + chunk * TuckerSm90a::kSlice * 4, lane);
    pin(sums);
    wgmma_fence();
    const uint64_t factor = swizzled(base + p.layout.out_factor + chunk * TuckerSm90a::kBlockBytes, 1024);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) wgmma<half>(sums, second[k], further(factor, k * 32));
    wgmma_commit();
    wgmma_wait<0>();
    pin(sums);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) pin(second[k]);
  }

  LOWRANK_OPS_HOPPER void run() {
    bool first = true;
    wait_phase(barriers.in_ready(), 0);
#pragma unroll 1
    for (int tile = int(blockIdx.x) + group * int(gridDim.x); tile < p.tiles.count;
         tile += TuckerSm90a::kGroups * int(gridDim.x)) {
      // The groups take turns plane by plane. After the CTA's last tile, if it is the first group's, there is no turn
      // of the second one.
      const bool alone = !one_plane && group == 0 && tile + int(gridDim.x) >= p.tiles.count;
      uint32_t second[kSteps][4];
      stages_of_planes(second, first, alone ? 0 : p.layout.skip);
      if (first) wait_phase(barriers.out_ready(), 0);
      __syncwarp();
      first = false;
      const ClassPlace place = p.tiles.place<one_plane>(tile);
#pragma unroll 1
      for (int chunk = 0; chunk < p.layout.chunks; ++chunk) {
        float sums[32];
        multiply(sums, second, chunk);
        activate(sums, p.activation);
        store_chunk<half>(&p.output[place.residue], hidden, sums, chunk, place.at, group, warp, lane);
      }
    }
    if (first_thread()) wait_stores();
  }
};

template <bool half, int ranks, int rows, bool one_plane>
__global__ void __launch_bounds__(TuckerSm90a::kThreads, 1)
    tucker_sm90a_kernel(const __grid_constant__ TuckerParams params) {
  constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  const uint32_t base = shared_base();
  const Barriers barriers{base};
  const int warp = __shfl_sync(~0u, int(threadIdx.x) / 32, 0), lane = int(threadIdx.x) % 32;
  if (threadIdx.x == 0) barriers.init(params.layout.slots);
  store_bias<half>(params, base);
  __syncthreads();
  const int producer = warp - TuckerSm90a::kGroups * 4;
  if (producer >= 0) {
    give_registers<kProducerRegisters>();
    if (producer == 0 && lane == 0) Producer<one_plane>{params, base, barriers, {}, {}, true}.run();
  } else {
    take_registers<kConsumerRegisters>();
    TuckerGroup<half, ranks, rows, one_plane>(params, base, barriers, warp, lane).run();
  }
}

}  // namespace lowrank_ops::hopper
