// The depthwise stages of the sm90a CP kernel for one lane.
#pragma once

#include "cuda/kernels/hopper.cuh"
#include "plan/gpu/cp_sm90a.h"

namespace lowrank_ops::hopper {

// The depthwise stages of one 16-byte column of a part, which is 8 ranks, two per lane: 3 taps down, rounded, then 3
// across, for the lane's output pixels, one below the other. `pixels`: address of the lane's two ranks in the first of
// the halo pixels that these need, 4x3 for two outputs; `line`: bytes from a line of the halo to the next.
template <bool half, int outputs>
LOWRANK_OPS_HOPPER void depthwise(uint32_t (&results)[2], uint32_t pixels, uint32_t line, uint32_t weights) {
  constexpr int kLines = outputs - 1 + CpSm90a::kTaps;
  float w[12];  // two ranks of each tap
#pragma unroll
  for (int i = 0; i < 3; ++i) load_shared(weights + i * 16, w[4 * i], w[4 * i + 1], w[4 * i + 2], w[4 * i + 3]);
  float sums[outputs][2] = {};
#pragma unroll
  for (int b = 0; b < 3; ++b) {
    float low[kLines], high[kLines];
#pragma unroll
    for (int a = 0; a < kLines; ++a) {
      const uint32_t word = load_shared_word(pixels + a * line + b * CpSm90a::kPitch);
      low[a] = widen_low<half>(word);
      high[a] = widen_high<half>(word);
    }
#pragma unroll
    for (int lower = 0; lower < outputs; ++lower) {
      float first = 0, second = 0;
#pragma unroll
      for (int tap = 0; tap < 3; ++tap) {
        first += w[2 * tap] * low[lower + tap];
        second += w[2 * tap + 1] * high[lower + tap];
      }
      const uint32_t both = pack<half>(first, second);
      sums[lower][0] += w[6 + 2 * b] * widen_low<half>(both);
      sums[lower][1] += w[7 + 2 * b] * widen_high<half>(both);
    }
  }
#pragma unroll
  for (int lower = 0; lower < outputs; ++lower) results[lower] = pack<half>(sums[lower][0], sums[lower][1]);
}

}  // namespace lowrank_ops::hopper
