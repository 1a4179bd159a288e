// Linear layers of few rows: dot products with the weight as it lies in memory, [columns, depth], vectors along the
// depth. Packing would touch every weight twice; here each is read once, which is all that matters when it is used for
// few rows.
//
//               weight rows n .. n + 3
//               w0   w1   w2   w3          each step: four loads of weights, one of the input a row,
//   input row 0 acc  acc  acc  acc         4 * kRows multiply-adds; the lanes of each sum are added at the end
//   input row 1 acc  acc  acc  acc
#pragma once

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/vector.h"

namespace lowrank_ops {
namespace LOWRANK_ISA {

#if defined(__AVX512F__)
constexpr int kDotRows = 6;
#else
constexpr int kDotRows = 2;
#endif

// Weights of type `In` times inputs of the tile's type `T`, which is also the accumulator's.
template <typename T, typename In>
struct Dot {
  using Input = T;
  using Weight = In;
  using Accumulator = T;
  using V = typename Vector<T>::Type;
  static constexpr int kStep = Vector<T>::kLanes;
  static inline V input(const T* p) { return load(p); }
  static inline V weight(const In* p) { return load(p); }
  static inline V input_part(const T* p, int64_t count) { return load_part(p, count); }
  static inline V weight_part(const In* p, int64_t count) { return load_part(p, count); }
  static inline V multiply_add(V a, V b, V acc) { return acc + a * b; }
};

#if defined(__AVX512BF16__)
struct DotBFloat16 {
  using Input = BFloat16;
  using Weight = BFloat16;
  using Accumulator = float;
  using V = Float;
  static constexpr int kStep = 2 * Vector<float>::kLanes;
  static inline V input(const BFloat16* p) { return (V)_mm512_loadu_si512(p); }
  static inline V weight(const BFloat16* p) { return (V)_mm512_loadu_si512(p); }
  static inline V input_part(const BFloat16* p, int64_t count) {
    return (V)_mm512_maskz_loadu_epi16(__mmask32((1ull << count) - 1), p);
  }
  static inline V weight_part(const BFloat16* p, int64_t count) { return input_part(p, count); }
  static inline V multiply_add(V a, V b, V acc) { return (V)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b); }
};
#endif

template <typename Dot, int kRows, int kColumns>
static void dot_block(const DotCall& call, int64_t row, int64_t column) {
  using V = typename Dot::V;
  using T = typename Dot::Accumulator;
  constexpr int kLanes = Vector<T>::kLanes;
  const auto* input = static_cast<const typename Dot::Input*>(call.input) + row * call.input_stride;
  const auto* weight = static_cast<const typename Dot::Weight*>(call.weight) + column * call.depth;
  V acc[kRows][kColumns];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < kColumns; ++c) acc[r][c] = V{};
  int64_t k = 0;
  for (; k + Dot::kStep <= call.depth; k += Dot::kStep) {
    V w[kColumns];
#pragma GCC unroll 16
    for (int c = 0; c < kColumns; ++c) w[c] = Dot::weight(weight + c * call.depth + k);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const V a = Dot::input(input + r * call.input_stride + k);
#pragma GCC unroll 16
      for (int c = 0; c < kColumns; ++c) acc[r][c] = Dot::multiply_add(a, w[c], acc[r][c]);
    }
  }
  if (k < call.depth) {
    const int64_t left = call.depth - k;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const V a = Dot::input_part(input + r * call.input_stride + k, left);
#pragma GCC unroll 16
      for (int c = 0; c < kColumns; ++c)
        acc[r][c] = Dot::multiply_add(a, Dot::weight_part(weight + c * call.depth + k, left), acc[r][c]);
    }
  }
  // kLanes accumulators at a time are transposed, so that adding vectors adds the lanes of each.
  T* sums = static_cast<T*>(call.sums) + row * call.sums_stride + column;
  T total[(kRows * kColumns + kLanes - 1) / kLanes * kLanes];
#pragma GCC unroll 4
  for (int first = 0; first < kRows * kColumns; first += kLanes) {
    V block[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      block[i] = first + i < kRows * kColumns ? acc[(first + i) / kColumns % kRows][(first + i) % kColumns] : V{};
    transpose(block);
#pragma GCC unroll 4
    for (int half = kLanes / 2; half > 0; half /= 2)
#pragma GCC unroll 8
      for (int i = 0; i < half; ++i) block[i] += block[i + half];
    store(total + first, block[0]);
  }
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kColumns; ++c) sums[r * call.sums_stride + c] = total[r * kColumns + c];
}

template <typename Dot, int kColumns, int kRows = kDotRows>
static inline void dot_rows(const DotCall& call, int64_t row, int64_t rows, int64_t column) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return dot_rows<Dot, kColumns, kRows - 1>(call, row, rows, column);
  }
  dot_block<Dot, kRows, kColumns>(call, row, column);
}

template <typename Dot>
static void dot(const DotCall& call) {
  for (int64_t column = 0; column < call.columns;) {
    constexpr int kWide = Vector<typename Dot::Accumulator>::kLanes;
    if (call.rows == 1 && call.columns - column >= kWide) {
      dot_block<Dot, 1, kWide>(call, 0, column);
      column += kWide;
      continue;
    }
    const bool four = call.columns - column >= 4;
    int64_t blocks = (call.rows + kDotRows - 1) / kDotRows;
    for (int64_t row = 0; row < call.rows; --blocks) {
      const int64_t rows = (call.rows - row + blocks - 1) / blocks;
      if (four)
        dot_rows<Dot, 4>(call, row, rows, column);
      else
        dot_rows<Dot, 1>(call, row, rows, column);
      row += rows;
    }
    column += four ? 4 : 1;
  }
}

}  // namespace LOWRANK_ISA
}  // namespace lowrank_ops
