// Products of a warp by ordinary multiply-adds, on any architecture and in any dtype (bf16 and fp16 with fp32 sums).
//
// A warp computes the same tile as on tensor cores, and each sum is held by the same lane: in each 16 x 8 tile a lane
// holds rows lane / 4 and lane / 4 + 8, columns lane % 4 * 2 and the next. For 32 x 64 sums in fp32 that is 4 rows x 16
// columns per lane: 20 loads of 16 bytes for 256 multiply-adds. Lanes of equal lane / 4 load the same row of A (8 rows
// per warp), lanes of equal lane % 4 the same row of B (4 rows): broadcasts, in different banks.
#pragma once

#include "cuda/kernels/primitives.cuh"

namespace lowrank_ops {

// 16 bytes of neighbouring elements.
template <typename Element>
struct alignas(kVectorBytes) Vector {
  static constexpr int size = kVectorBytes / int(sizeof(Element));
  Element value[size];
};

template <typename ElementType, typename SumType>
struct MultiplyAdds {
  using Element = ElementType;
  using Sum = SumType;

  static constexpr int a_rows = 2;
  static LOWRANK_OPS_DEVICE int a_row(int lane, int i) { return lane / 4 + 8 * i; }

  static LOWRANK_OPS_DEVICE Pair<Element> narrow_both(Sum first, Sum second) {
    return {{narrow<Element, Sum>(first), narrow<Element, Sum>(second)}};
  }
  // Two elements of the hidden tile, as the next product reads them.
  static LOWRANK_OPS_DEVICE Pair<Element> hidden_pair(Sum first, Sum second) { return narrow_both(first, second); }

  // The same contract as TensorCores::multiply (engine_sm80.cuh).
  template <bool hidden, int M, int N>
  static LOWRANK_OPS_DEVICE void multiply(Sum (&sum)[M][N][4], const unsigned char* a, const int (&a_row)[M][a_rows],
                                          const unsigned char* b, int b_stride, int bytes, int lane) {
    using Loaded = Vector<Element>;
    b += lane % 4 * 2 * b_stride;
#pragma unroll 1
    for (int k = 0; k < bytes; k += kVectorBytes) {
      Sum rows[M][a_rows][Loaded::size];
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int i = 0; i < a_rows; ++i) {
          const Loaded loaded = load_shared<Loaded>(a + a_row[m][i] + k);
#pragma unroll
          for (int e = 0; e < Loaded::size; ++e) rows[m][i][e] = widen(loaded.value[e]);
        }
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int column = 0; column < 2; ++column) {
          const Loaded loaded = load_shared<Loaded>(b + (n * 8 + column) * b_stride + k);
#pragma unroll
          for (int e = 0; e < Loaded::size; ++e) {
            const Sum factor = widen(loaded.value[e]);
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
              for (int i = 0; i < a_rows; ++i) sum[m][n][2 * i + column] += rows[m][i][e] * factor;
          }
        }
    }
  }
};

}  // namespace lowrank_ops
