// The warp-wide instructions, for all lanes at once, from the fragment layouts of the PTX ISA ("Matrix fragments for
// mma.m16n8k16 / mma.m16n8k8", "ldmatrix"). With group = lane / 4 and t = lane % 4:
//   16-bit operands:  a0 (group, 2t), a1 (group + 8, 2t), a2 (group, 2t + 8), a3 (group + 8, 2t + 8), two columns each;
//                     b0 (2t, group), b1 (2t + 8, group), two rows each
//   tf32 operands:    a0 (group, t), a1 (group + 8, t), a2 (group, t + 4), a3 (group + 8, t + 4);
//                     b0 (t, group), b1 (t + 4, group)
//   sums:             c0, c1 (group, 2t) and (group, 2t + 1); c2, c3 eight rows below
// So one register of all lanes is a matrix of 8 rows of 4 words. Products are exact in fp32. The PTX ISA does not say
// in which order they are summed and how sums are rounded; here k ascends, in fp32.
#include <cstring>

#include "counters.h"
#include "number_formats.h"
#include "shared_checker.h"
#include "simulator.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace lowrank_ops::simulator {
namespace {

typedef float Row __attribute__((vector_size(32)));  // one row of sums: 8 columns

// Unpacks one register of all lanes to 8 rows of 8 (16 bits) or 4 (tf32) numbers; rows are `stride` apart.
void unpack(Primitive kind, const uint32_t* words, float* rows, int stride) {
  if (kind == Primitive::kMultiplyBFloat16) {
    typedef uint32_t Words __attribute__((vector_size(32)));
    for (int row = 0; row < 8; row++) {
      Words pairs;
      for (int i = 0; i < 8; i++) pairs[i] = words[4 * row + i / 2];
      pairs = pairs << Words{16, 0, 16, 0, 16, 0, 16, 0} & 0xffff0000;
      std::memcpy(rows + row * stride, &pairs, sizeof pairs);
    }
  } else if (kind == Primitive::kMultiplyHalf) {
    for (int row = 0; row < 8; row++) {
      uint16_t halves[8];
      std::memcpy(halves, words + 4 * row, sizeof halves);
#ifdef __F16C__
      _mm256_storeu_ps(rows + row * stride, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<__m128i*>(halves))));
#else
      for (int i = 0; i < 8; i++) rows[row * stride + i] = half_to_float(halves[i]);
#endif
    }
  } else {
    for (int lane = 0; lane < kLanes; lane++) rows[lane / 4 * stride + lane % 4] = std::bit_cast<float>(words[lane]);
  }
}

template <int depth>
void multiply_rows(const float (&a)[16][16], const float (&b)[8][16], float (*sum)[kLanes][2]) {
  Row columns[depth];
  for (int k = 0; k < depth; k++)
    for (int n = 0; n < 8; n++) columns[k][n] = b[n][k];
  for (int half = 0; half < 2; half++) {
    Row rows[8];
    std::memcpy(rows, sum[half], sizeof rows);
#pragma GCC unroll 16
    for (int k = 0; k < depth; k++)
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) rows[i] += a[8 * half + i][k] * columns[k];
    std::memcpy(sum[half], rows, sizeof rows);
  }
}

}  // namespace

void multiply(Warp& warp, Primitive kind) {
  const int half = kind == Primitive::kMultiplyTf32 ? 4 : 8;
  float a[16][16], b[8][16];
  for (int i = 0; i < 4; i++) unpack(kind, warp.a[i], &a[i % 2 * 8][i / 2 * half], 16);
  for (int i = 0; i < 2; i++) unpack(kind, warp.b[i], &b[0][i * half], 16);
  if (kind == Primitive::kMultiplyTf32)
    multiply_rows<8>(a, b, warp.sum);
  else
    multiply_rows<16>(a, b, warp.sum);
}

void load_matrices(Warp& warp) {
  const uint32_t state = state_of(warp);
  for (int first = 0; first < kLanes; first += 8) {
    uintptr_t offsets[8];
    for (int i = 0; i < 8; i++) {
      int64_t offset = shared_offset(warp.row[first + i], 16, Primitive::kLoadMatrices, warp.site);
      const int64_t shifted = offset + machine.settings.shift_load_matrices;
      if (shifted + 16 <= machine.shared_bytes) offset = shifted;
      check_read<16>(offset, state, Primitive::kLoadMatrices, warp.site);
      std::memcpy(&warp.matrices[first / 8][4 * i], machine.shared + offset, 16);
      offsets[i] = uintptr_t(offset);
    }
    if (machine.settings.count) count_conflict(Primitive::kLoadMatrices, warp.site, conflict_ways(offsets, 8, 16));
  }
}

}  // namespace lowrank_ops::simulator
