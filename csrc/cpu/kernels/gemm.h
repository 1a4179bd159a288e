// The register kernel behind every stage: kRows x (kVectors * lanes) sums live in registers over all taps and all of
// the depth, then bias, activation and conversion are applied on the way out.
//
//            B panel [taps][depth / group][width][group], one row per step, kVectors vectors
//            +--------+--------+--------+--------+
//   A[row 0] |  acc   |  acc   |  acc   |  acc   |     each step: kVectors loads of B, kRows broadcasts of A,
//   A[row 1] |  acc   |  acc   |  acc   |  acc   |     kRows * kVectors multiply-adds
//    ...     |        |        |        |        |
//
// Rows of A lie `row_stride` apart, so a window that slides over a channels-last row buffer needs no im2col: KW taps of
// a row are one depth of KW * R1 contiguous elements when the dilation is 1.
//
// GFLOP/s on a Zen 4 core (its peak: 118 in fp32, 236 in bf16), 64 columns, here and with oneDNN's brgemm:
//   depth 64:  fp32 114 and 113, bf16 225 (brgemm does not offer bf16 there)
//   depth 256: fp32 117 and 117, bf16 232
// brgemm generates code for each shape and thread, and writes its sums to memory between taps.
#pragma once

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/prefetch.h"
#include "cpu/kernels/vector.h"

namespace lowrank_ops {
namespace LOWRANK_ISA {

#if defined(__AVX512F__)
// 32 registers hold the sums, the vectors of B and one of A. A spilled sum costs little on Zen 4 (7x4 runs at 117 of
// 118 GFLOP/s), but on Zen 5 a store and a load take longer than a step: 7x4 runs at 253 of 270 GFLOP/s (bf16: 450 of
// 545), 6x4 at 266 (532).
constexpr int kMaxVectors = 4;
constexpr int kMaxRows[kMaxVectors + 1] = {0, 14, 14, 8, 6};
#else
// 16 registers.
constexpr int kMaxVectors = 2;
constexpr int kMaxRows[kMaxVectors + 1] = {0, 12, 6};
#endif

// How elements multiply: `Element` is their type in memory, left() broadcasts one element of A (bf16: a pair).
template <typename T>
struct Multiply {
  using Element = T;
  using Accumulator = T;
  using V = typename Vector<T>::Type;
  static constexpr int kGroup = 1;
  static inline V left(const T* a) { return broadcast<V>(*a); }
  static inline V right(const T* b) { return load(b); }
  static inline V multiply_add(V a, V b, V acc) { return acc + a * b; }
};
using MultiplyFloat = Multiply<float>;
using MultiplyDouble = Multiply<double>;

#if defined(__AVX512BF16__)
struct MultiplyBFloat16 {
  using Element = BFloat16;
  using Accumulator = float;
  using V = Float;
  static constexpr int kGroup = 2;
  static inline V left(const BFloat16* a) {
    int32_t pair;
    memcpy(&pair, a, 4);
    return (V)_mm512_set1_epi32(pair);
  }
  static inline V right(const BFloat16* b) { return (V)_mm512_loadu_si512(b); }
  static inline V multiply_add(V a, V b, V acc) { return (V)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b); }
};
#endif

template <typename Out, int kRows, int kVectors, typename V>
static inline void write(const V (&acc)[kRows][kVectors], const GemmCall& call, int64_t first_row) {
  constexpr int kLanes = sizeof(V) / sizeof(acc[0][0][0]);
  Out* out = static_cast<Out*>(call.out) + first_row * call.out_stride;
  const int64_t last = call.width - (kVectors - 1) * kLanes;  // columns of the last vector
  const bool whole = last == kLanes;
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row, out += call.out_stride) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors - 1; ++v) store(out + v * kLanes, acc[row][v]);
    if (whole)
      store(out + (kVectors - 1) * kLanes, acc[row][kVectors - 1]);
    else
      store_part(out + (kVectors - 1) * kLanes, acc[row][kVectors - 1], last);
  }
}

template <typename Multiply, int kRows, int kVectors>
static __attribute__((always_inline)) inline void finish(typename Multiply::V (&acc)[kRows][kVectors],
                                                         const GemmCall& call, int64_t first_row) {
  using V = typename Multiply::V;
  using T = typename Multiply::Accumulator;
  constexpr int kLanes = Vector<T>::kLanes;
  if (call.bias) {
    const T* bias = static_cast<const T*>(call.bias);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const V value = load(bias + v * kLanes);
#pragma GCC unroll 16
      for (int row = 0; row < kRows; ++row) acc[row][v] += value;
    }
  }
  if (call.activation == Activation::kRelu) {
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[row][v] = clamp_below(acc[row][v], V{});
  } else if (call.activation != Activation::kNone) {
    V spilled[kRows][kVectors];  // a copy in memory, so that the sums stay in registers on the other paths
    memcpy(&spilled, &acc, sizeof(acc));
    for (int row = 0; row < kRows; ++row)
      for (int v = 0; v < kVectors; ++v) spilled[row][v] = activate(spilled[row][v], call.activation);
    memcpy(&acc, &spilled, sizeof(acc));
  }
  if constexpr (sizeof(T) == sizeof(double)) {
    write<double>(acc, call, first_row);
  } else {
    if (call.out_type == DType::kFloat) write<float>(acc, call, first_row);
    if (call.out_type == DType::kBFloat16) write<BFloat16>(acc, call, first_row);
    if (call.out_type == DType::kHalf) write<Half>(acc, call, first_row);
  }
}

// Memory that later calls will touch, prefetched along the depth: one line per step, each `stride` bytes after the
// last.
struct PacedPrefetch {
  const char* next = nullptr;
  int64_t stride = 0;
};

template <typename Multiply, int kRows, int kVectors, bool kPrefetches>
static void multiply_block(const GemmCall& call, int64_t first_row, PacedPrefetch prefetch) {
  using V = typename Multiply::V;
  using Element = typename Multiply::Element;
  constexpr int kLanes = Vector<typename Multiply::Accumulator>::kLanes;
  constexpr int kGroup = Multiply::kGroup;
  constexpr int kBases = (kRows + 2) / 3;  // one pointer per three rows: x86 addresses reach base + {0, 1, 2} * stride
  V acc[kRows][kVectors];
  if (call.initial) {
    const auto* initial = static_cast<const typename Multiply::Accumulator*>(call.initial);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        acc[row][v] = load(initial + (first_row + row) * call.initial_stride + v * kLanes);
  } else {
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[row][v] = V{};
  }
  const Element* b = static_cast<const Element*>(call.weight);
  const int64_t stride = call.row_stride;
  const int64_t step = (call.weight_columns > 0 ? call.weight_columns : kVectors * kLanes) * kGroup;
  for (int64_t tap = 0; tap < call.num_taps; ++tap) {
    if (call.tap_weights) b = static_cast<const Element*>(call.tap_weights[tap]);
    const Element* base[kBases];
    for (int i = 0; i < kBases; ++i)
      base[i] = static_cast<const Element*>(call.taps[tap]) + (first_row + 3 * i) * stride;
    for (int64_t k = 0; k < call.depth; k += kGroup) {
      V right[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) right[v] = Multiply::right(b + v * kLanes * kGroup);
      b += step;
      if constexpr (kPrefetches) {
        __builtin_prefetch(prefetch.next, 0, 2);
        prefetch.next += prefetch.stride;
      }
#pragma GCC unroll 16
      for (int row = 0; row < kRows; ++row) {
        const V left = Multiply::left(base[row / 3] + (row % 3) * stride + k);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) acc[row][v] = Multiply::multiply_add(left, right[v], acc[row][v]);
      }
    }
  }
  finish<Multiply, kRows, kVectors>(acc, call, first_row);
}

// Runs `rows` rows in blocks as even as possible: 15 rows are 8 + 7, not 14 + 1.
template <typename Multiply, int kVectors, bool kPrefetches, int kRows = kMaxRows[kVectors]>
static inline void dispatch_rows(const GemmCall& call, int64_t first_row, int64_t rows, PacedPrefetch prefetch) {
  if constexpr (kRows == 1) {
    multiply_block<Multiply, 1, kVectors, kPrefetches>(call, first_row, prefetch);
  } else {
    if (rows == kRows)
      multiply_block<Multiply, kRows, kVectors, kPrefetches>(call, first_row, prefetch);
    else
      dispatch_rows<Multiply, kVectors, kPrefetches, kRows - 1>(call, first_row, rows, prefetch);
  }
}

template <typename Multiply, int kVectors = kMaxVectors>
static inline void dispatch_width(const GemmCall& call) {
  constexpr int kLanes = Vector<typename Multiply::Accumulator>::kLanes;
  if constexpr (kVectors > 1) {
    if (call.width <= (kVectors - 1) * kLanes) return dispatch_width<Multiply, kVectors - 1>(call);
  }
  constexpr int64_t kMost = kMaxRows[kVectors];
  int64_t blocks = (call.rows + kMost - 1) / kMost;
  for (int64_t row = 0; row < call.rows; --blocks) {
    const int64_t count = (call.rows - row + blocks - 1) / blocks;
    if (call.far_input) {
      constexpr int64_t kBytes = sizeof(typename Multiply::Element);
      prefetch_rows<false>(static_cast<const char*>(call.taps[0]) + (row + 2 * kMost) * call.row_stride * kBytes, count,
                           call.row_stride * kBytes, call.depth * kBytes);
    }
    if (call.far_output) {
      const int64_t bytes = call.out_type == DType::kFloat ? 4 : call.out_type == DType::kDouble ? 8 : 2;
      prefetch_rows<true>(static_cast<const char*>(call.out) + (row + kMost) * call.out_stride * bytes, count,
                          call.out_stride * bytes, call.width * bytes);
    }
    PacedPrefetch prefetch;
    if (call.prefetch_lines > 0) {
      const int64_t first = call.prefetch_lines * row / call.rows,
                    last = call.prefetch_lines * (row + count) / call.rows;
      // One line per step; only those that are more than the steps are prefetched at once, because many at once keep
      // the block's own loads waiting. Blocks of one vector have no slot for one more load in a step.
      const int64_t lines = last - first, steps = kVectors > 1 ? call.num_taps * call.depth / Multiply::kGroup : 0;
      const int64_t paced = lines < steps ? lines : steps;
      const char* line = call.prefetch + 64 * first;
      prefetch_rows<false>(line, 1, 0, 64 * (lines - paced));
      if (paced > 0) prefetch = {line + 64 * (lines - paced), (64 * paced + steps - 1) / steps};
    }
    if (kVectors > 1 && prefetch.stride > 0)
      dispatch_rows<Multiply, kVectors, (kVectors > 1)>(call, row, count, prefetch);
    else
      dispatch_rows<Multiply, kVectors, false>(call, row, count, prefetch);
    row += count;
  }
}

template <typename Multiply>
static void gemm(const GemmCall& call) {
  dispatch_width<Multiply>(call);
}

// The same end of a product for sums that another kernel left in memory.
template <typename T>
static void finish_sums(const void* sums, int64_t sums_stride, const GemmCall& call) {
  using V = typename Vector<T>::Type;
  constexpr int kLanes = Vector<T>::kLanes;
  const int64_t bytes = call.out_type == DType::kDouble ? 8 : call.out_type == DType::kFloat ? 4 : 2;
  GemmCall part = call;
  for (int64_t row = 0; row < call.rows; ++row) {
    const T* source = static_cast<const T*>(sums) + row * sums_stride;
    for (int64_t column = 0; column < call.width; column += part.width) {
      const int64_t left = call.width - column;
      part.out = static_cast<char*>(call.out) + column * bytes;
      part.bias = call.bias ? static_cast<const T*>(call.bias) + column : nullptr;
      if (left >= 4 * kLanes) {
        part.width = 4 * kLanes;
        V acc[1][4];
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) acc[0][v] = load(source + column + v * kLanes);
        finish<Multiply<T>, 1, 4>(acc, part, row);
      } else {
        part.width = left < kLanes ? left : kLanes;
        V acc[1][1] = {{load(source + column)}};
        finish<Multiply<T>, 1, 1>(acc, part, row);
      }
    }
  }
}

}  // namespace LOWRANK_ISA
}  // namespace lowrank_ops
