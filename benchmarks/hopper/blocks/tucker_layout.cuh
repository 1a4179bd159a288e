// The fused Tucker-2 kernel's plan: what a variant chooses, the kernel's tile, roles, shared memory and barriers.
//
// A CTA stays on its multiprocessor and computes the tiles blockIdx.x, blockIdx.x + gridDim.x, ... A tile is 8x8 pixels
// of the output (the 64 rows of a wgmma):
//
//   input: 10x10 pixels (halo), 256 channels      stage 1    hidden: 10x10 pixels, 64 ranks     stage 2
//   4 slices [100 pixels][64 channels]           -------->   [104 rows][64] in shared memory   -------->
//                                                in_factor                                       core
//   second: 8x8 pixels, 64 ranks                  stage 3    out: 8x8 pixels, 4 chunks of 64 channels
//   in registers, as operand A                   -------->   from registers (or by the copy engine)
//                                               out_factor
//
// All matrices in shared memory have rows of 128 bytes in the 128-byte swizzle. Stage 1 computes the transpose,
// ranks x pixels = [64, K] [K, 104], so that 100 pixels cost 104 columns and not 128 rows. Stage 2's nine taps are nine
// views of the hidden tile: the 8x8 pixels of a tap are 8 groups of 8 rows, 10 rows apart.
//
//   warpgroup 0      tiles 0, G, 2 G, ... of the CTA, all three stages        (G = `groups`)
//   ...
//   warpgroup G - 1  tiles G - 1, 2 G - 1, ...
//   warpgroup G      one thread: all copies to shared memory, in the order of the tiles
//
// Shared memory, from the top:
//
//   slot 0 | slot 1 | ... | slot `slots` - 1     the ring of input slices, 104 rows each, of which a slice fills 100
//   hidden of group 0 | ... | of group G - 1     104 rows each; with tma_store 128, which are two chunks on their way
//   out in_factor                                    4 slices [64 ranks][64 channels]; absent with `registers` core 9
//   taps [64][64] out_factor                                   4 parts [64 channels][64 ranks]
//
// The 512 bytes that a slice leaves of its slot are used: barriers in slot 0, bias in slots 1 and 2.
//
// Barriers (one thread's copies complete the bytes of a phase):
//
//   full[turn][group][slice]   a slice of the group's tile has arrived          producer -> group
//   empty[slot]                the 4 warps of a group are done with the slot    group -> producer
//   in_ready, core_ready, out_ready   a factor has arrived, once                producer -> all groups
//
// Why `full` is one barrier per warpgroup and slice, and not one per slot as `empty` is: a wait names its phase by a
// parity only, so whoever waits may be at most one phase behind. The slots go round among the groups: with one barrier
// per slot, a group may come to wait for a phase while the phase before it, which serves another group's tile, is still
// incomplete. The last complete phase then has the parity that the group waits for, so it goes on at once and reads
// another tile's slice or half of its own. The emulator found this; a GPU would have shown it only now and then. Of a
// barrier of its own the group sees every phase. `turns` of them are used in turn where there are more slots than
// slices of the groups' tiles, so that none starts a new phase before the slice of the phase before it was consumed.
#pragma once

#include "tucker_block.cuh"

namespace hopper::tucker {

static_assert(kSlotBytes % 1024 == 0 && kSlotBytes - kSliceBytes == 512, "what follows a slice in its slot is used");

// What an ablation leaves out. Its results are wrong.
enum Skip { kNothing = 0, kStore = 1, kLoad = 2, kStage2 = 4, kStage1 = 8, kStage3 = 16 };

// A variant; others derive from it.
struct Plan {
  static constexpr int groups = 2;          // warpgroups, each with tiles of its own
  static constexpr int slots = 4;           // of the ring of input slices
  static constexpr bool registers = false;  // in_factor in registers
  static constexpr bool overlap = true;     // stage 3's next products run under the storing of the ones before
  static constexpr bool tma_store = false;  // the copy engine writes the output, else lanes do, 16 bytes each
  static constexpr int skip = kNothing;
  static constexpr bool profile = false;  // clocks of the stages
};

// Shared memory of a variant.
template <class P>
struct Layout {
  static constexpr int threads = P::groups * 128 + 128;
  static constexpr int registers = P::groups == 2 ? 240 : 160;  // of the threads that compute
  static constexpr int hidden_bytes = P::tma_store ? 2 * kFactorSlice : kSlotBytes;
  static constexpr int hidden = P::slots * kSlotBytes;
  static constexpr int in_factor = hidden + P::groups * hidden_bytes;
  static constexpr int core = in_factor + (P::registers ? 0 : kInBytes);
  static constexpr int out_factor = core + kCoreBytes;
  static constexpr int total = out_factor + kOutBytes;
  static constexpr int turns = (P::slots + 4 * P::groups - 1) / (4 * P::groups);
  static constexpr int awaited = turns * 4 * P::groups;  // barriers `full`
  static constexpr int full = kSliceBytes, empty = full + awaited * 8;
  static constexpr int in_ready = empty + P::slots * 8, core_ready = in_ready + 8, out_ready = core_ready + 8;
  static_assert(total <= kSharedLimit, "too much shared memory");
  static_assert(P::slots >= 4 && (P::slots + awaited + 3) * 8 <= 512, "slots");
};

DEVICE int bias_place(int channel) {
  return (1 + channel / 128) * kSlotBytes + kSliceBytes + channel % 128 * 4;
}

// The rounded sums [16 warp rows, 64] to rows of 128 bytes in the swizzle, `rows` being the first of the warp's; a half
// of 8 rows is stored where its flag says so.
DEVICE void store_rows(uint32_t rows, int lane, const float (&sums)[32], bool first = true, bool second = true) {
  const uint32_t row = rows + lane % 8 * kRow;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (!(half == 0 ? first : second)) continue;
#pragma unroll
    for (int j = 0; j < 8; j += 4)
      store_matrices<false>(row + half * 8 * kRow + ((j + lane / 8) ^ (lane % 8)) * 16,
                            pack(sums[4 * j + 2 * half], sums[4 * j + 2 * half + 1]),
                            pack(sums[4 * j + 4 + 2 * half], sums[4 * j + 5 + 2 * half]),
                            pack(sums[4 * j + 8 + 2 * half], sums[4 * j + 9 + 2 * half]),
                            pack(sums[4 * j + 12 + 2 * half], sums[4 * j + 13 + 2 * half]));
  }
}

}  // namespace hopper::tucker
