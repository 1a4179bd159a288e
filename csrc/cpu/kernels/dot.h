// Linear layers of few rows: dot products with the weight as it lies in memory, [columns, depth], vectors along the
// depth. Packing would touch every weight twice; here each is read once, which is all that matters when it is used for
// few rows. The first stage of a convolution with a rank of one is the same, with pixels in place of the weight's rows
// (cpu/channel_sum.h), and so is a core with one output channel, one tap at a time (cpu/direct_core.cpp).
//
//               weight rows n .. n + 2
//               w0   w1   w2          each step: three loads of weights, one of the input per row, 3 * kRows
//   input row 0 acc  acc  acc         multiply-adds; the lanes of each sum are added at the end
//   input row 1 acc  acc  acc
//
// Several deep rows would be evicted from L1 between one group of columns and the next. So the depth is divided into
// blocks of kDotBlockBytes, and the accumulators of at most kDotColumns columns wait in memory. The order of a sum is
// the same for any number of rows and columns.
#pragma once

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/prefetch.h"
#include "cpu/kernels/vector.h"

namespace lowrank_ops {
namespace LOWRANK_ISA {

#if defined(__AVX512F__)
constexpr int kDotRows = 8;
#else
constexpr int kDotRows = 2;
#endif
constexpr int kDotBlockBytes = 2048;  // per row: those of eight rows are half of an L1 of 32 KB
constexpr int kPrefetchBytes = 2048;  // how far ahead of their use weights in memory are prefetched
constexpr int kDotColumns = 48;       // columns whose accumulators are kept between blocks

// Columns of a block of so many rows: the accumulators, one vector per column and one of the input fit the registers.
constexpr int dot_columns(int rows) {
#if defined(__AVX512F__)
  return rows <= 2 ? 8 : rows <= 6 ? 4 : 3;
#else
  return rows == 1 ? 8 : 4;
#endif
}

// Weights of type `In` times inputs of the tile's type `T`, which is also the accumulator's.
template <typename T, typename In>
struct Dot {
  using Input = T;
  using Weight = In;
  using Accumulator = T;
  using V = typename Vector<T>::Type;
  static constexpr int kStep = Vector<T>::kLanes;
  static constexpr int kBlock = kDotBlockBytes / sizeof(T);
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
  static constexpr int kBlock = kDotBlockBytes / 2;
  static inline V input(const BFloat16* p) { return (V)_mm512_loadu_si512(p); }
  static inline V weight(const BFloat16* p) { return (V)_mm512_loadu_si512(p); }
  static inline V input_part(const BFloat16* p, int64_t count) {
    return (V)_mm512_maskz_loadu_epi16(__mmask32((1ull << count) - 1), p);
  }
  static inline V weight_part(const BFloat16* p, int64_t count) { return input_part(p, count); }
  static inline V multiply_add(V a, V b, V acc) { return (V)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b); }
};
#endif

// Adds up the lanes of kLanes vectors: lane i of the result is the sum of block[i].
template <typename V, int kLanes>
static inline V add_lanes(V (&block)[kLanes]) {
  typedef decltype(V{} < V{}) Index;
  Index low, high;  // two vectors interleaved, half of each at a time
  for (int i = 0; i < kLanes; ++i) {
    low[i] = (i % 2) * kLanes + i / 2;
    high[i] = (i % 2) * kLanes + i / 2 + kLanes / 2;
  }
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i)
      block[i] = __builtin_shuffle(block[i], block[i + half], low) + __builtin_shuffle(block[i], block[i + half], high);
  return block[0];
}

// Keeps a value in a register. Otherwise the compiler reads it from memory again for every column, and loads become the
// bottleneck.
template <typename V>
static inline V in_register(V v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#endif
  return v;
}

// A part of the depth of a block of columns, [begin, end). The accumulators come from `partial` unless it is the first
// part, and go there unless it is the last. `input` points to this part of the block's first row.
struct DotPart {
  const void* input;
  int64_t begin, end;
  void* partial;
  bool first, last;
};

// Adds up the lanes of each accumulator and writes the sums of a block.
template <typename Dot, int kRows, int kColumns>
__attribute__((always_inline)) static inline void write_sums(const typename Dot::V (&acc)[kRows][kColumns],
                                                             typename Dot::Accumulator* sums, int64_t sums_stride) {
  using V = typename Dot::V;
  using T = typename Dot::Accumulator;
  constexpr int kLanes = Vector<T>::kLanes;
  T total[(kRows * kColumns + kLanes - 1) / kLanes * kLanes];
#pragma GCC unroll 4
  for (int first = 0; first < kRows * kColumns; first += kLanes) {
    V block[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      block[i] = first + i < kRows * kColumns ? acc[(first + i) / kColumns % kRows][(first + i) % kColumns] : V{};
    store(total + first, add_lanes(block));
  }
  for (int r = 0; r < kRows; ++r) memcpy(sums + r * sums_stride, total + r * kColumns, kColumns * sizeof(T));
}

template <typename Dot, int kRows, int kColumns, bool kPrefetches = false>
__attribute__((noinline)) static void dot_block(const DotCall& call, const DotPart& part, int64_t row, int64_t column) {
  using V = typename Dot::V;
  using T = typename Dot::Accumulator;
  const auto* input = static_cast<const typename Dot::Input*>(part.input) - part.begin;
  const auto* weight = static_cast<const typename Dot::Weight*>(call.weight) + column * call.weight_stride;
  V acc[kRows][kColumns];
  if (part.first) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
      for (int c = 0; c < kColumns; ++c) acc[r][c] = V{};
  } else {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
      for (int c = 0; c < kColumns; ++c) acc[r][c] = static_cast<const V*>(part.partial)[r * kColumns + c];
  }
  int64_t k = part.begin;
  for (; k + Dot::kStep <= part.end; k += Dot::kStep) {
    V w[kColumns];
#pragma GCC unroll 16
    for (int c = 0; c < kColumns; ++c) {
      w[c] = Dot::weight(weight + c * call.weight_stride + k);
      if constexpr (kPrefetches) __builtin_prefetch(weight + (kColumns + c) * call.weight_stride + k, 0, 2);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const V a = in_register(Dot::input(input + r * call.input_stride + k));
#pragma GCC unroll 16
      for (int c = 0; c < kColumns; ++c) acc[r][c] = Dot::multiply_add(a, w[c], acc[r][c]);
    }
  }
  if (k < part.end) {
    const int64_t left = part.end - k;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const V a = Dot::input_part(input + r * call.input_stride + k, left);
#pragma GCC unroll 16
      for (int c = 0; c < kColumns; ++c)
        acc[r][c] = Dot::multiply_add(a, Dot::weight_part(weight + c * call.weight_stride + k, left), acc[r][c]);
    }
  }
  if (!part.last) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
      for (int c = 0; c < kColumns; ++c) static_cast<V*>(part.partial)[r * kColumns + c] = acc[r][c];
    return;
  }
  write_sums<Dot, kRows, kColumns>(acc, static_cast<T*>(call.sums) + row * call.sums_stride + column, call.sums_stride);
}

// Whether adding up the lanes takes most of the time. It is fastest for whole vectors of sums: 1 x 16 or 4 x 4
// (AVX-512).
template <typename Dot>
static inline bool is_short(const DotCall& call) {
  return call.depth <= 16 * Dot::kStep;
}

// Prefetches `count` columns, kPrefetchBytes after `column` or right after it where they are longer than that.
template <typename Dot>
__attribute__((always_inline)) static inline void prefetch_columns(const DotCall& call, int64_t column, int64_t count) {
  constexpr int64_t kBytes = sizeof(typename Dot::Weight);
  const int64_t bytes = call.depth * kBytes, stride = call.weight_stride * kBytes, block = count * stride;
  const int64_t ahead = (kPrefetchBytes + block - 1) / block * block;
  const char* first = static_cast<const char*>(call.weight) + column * stride + ahead;
  if (bytes == stride)
    prefetch_rows<false>(first, 1, block, block);
  else
    prefetch_rows<false>(first, count, stride, bytes);
}

// Columns [column, end) for kRows rows from `row`.
template <typename Dot, int kRows>
static void dot_columns_of(const DotCall& call, DotPart part, int64_t row, int64_t column, int64_t end) {
  using V = typename Dot::V;
  constexpr int kColumns = dot_columns(kRows);
  // The hardware prefetches along a weight's row, and has to start anew in every block of every row. Prefetching the
  // next columns raises 13 GB/s to 22 for eight rows and weights in memory; for short columns or few rows it costs more
  // than it gains.
  if constexpr (kRows >= 4) {
    for (; call.depth > 8 * Dot::kStep && column + kColumns <= end; column += kColumns) {
      dot_block<Dot, kRows, kColumns, true>(call, part, row, column);
      part.partial = static_cast<V*>(part.partial) + kRows * kColumns;
    }
  }
  if constexpr (kRows == 1) {  // long columns: so many streams are more than the hardware's prefetching can follow
    constexpr int kLanes = Vector<typename Dot::Accumulator>::kLanes;
    for (; is_short<Dot>(call) && column + kLanes <= end; column += kLanes) {
      if (call.far_weight) prefetch_columns<Dot>(call, column, kLanes);
      dot_block<Dot, 1, kLanes>(call, part, row, column);
      part.partial = static_cast<V*>(part.partial) + kLanes;
    }
  }
  for (; column + kColumns <= end; column += kColumns) {
    dot_block<Dot, kRows, kColumns>(call, part, row, column);
    part.partial = static_cast<V*>(part.partial) + kRows * kColumns;
  }
  for (; column < end; ++column) {
    dot_block<Dot, kRows, 1>(call, part, row, column);
    part.partial = static_cast<V*>(part.partial) + kRows;
  }
}

template <typename Dot, int kRows = kDotRows>
static inline void dot_rows(const DotCall& call, const DotPart& part, int64_t row, int64_t rows, int64_t column,
                            int64_t end) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return dot_rows<Dot, kRows - 1>(call, part, row, rows, column, end);
  }
  dot_columns_of<Dot, kRows>(call, part, row, column, end);
}

template <typename Dot>
static void dot(const DotCall& given) {
  using V = typename Dot::V;
  DotCall call = given;
  const int64_t block = call.rows > 1 && call.depth > Dot::kBlock ? Dot::kBlock : call.depth;
  const int64_t most = kDotRows > 4 && call.rows % 4 == 0 && is_short<Dot>(call) ? 4 : kDotRows;
  V partial[kMostDotRows * kDotColumns];
  for (int64_t column = 0; column < call.columns; column += kDotColumns) {
    const int64_t end = call.columns - column < kDotColumns ? call.columns : column + kDotColumns;
    const int64_t parts = (call.depth + block - 1) / block;
    DotPart part;
    for (int64_t index = 0; index < call.num_taps * parts; ++index) {
      if (call.tap_weights) {
        call.weight = call.tap_weights[index / parts];
        call.input = call.tap_inputs[index / parts];
      }
      part.begin = index % parts * block;
      part.end = call.depth - part.begin < block ? call.depth : part.begin + block;
      part.first = index == 0;
      part.last = index + 1 == call.num_taps * parts;
      int64_t blocks = (call.rows + most - 1) / most;
      for (int64_t row = 0; row < call.rows; --blocks) {
        const int64_t rows = (call.rows - row + blocks - 1) / blocks;
        part.input =
            static_cast<const typename Dot::Input*>(call.input) + part.begin * call.rows + row * call.input_stride;
        part.partial = partial + row * kDotColumns;
        dot_rows<Dot>(call, part, row, rows, column, end);
        row += rows;
      }
    }
  }
}

}  // namespace LOWRANK_ISA
}  // namespace lowrank_ops
