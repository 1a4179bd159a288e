// Products on tensor cores by mma.sync (Ampere and everything after it): bf16, fp16, and fp32 rounded to tf32.
//
// A warp multiplies A [16 * M, K] by B [8 * N, K] transposed, both with K contiguous in shared memory. K goes in steps
// of 32 bytes: 16 elements of 2 bytes or 8 of 4, for which ldmatrix and mma address alike. ldmatrix loads four 8 x
// 16-byte matrices; lanes give the rows:
//
//     A tile, 16 rows       B, two tiles of 8 columns (rows in memory)
//     lanes  0-7  | 16-23   lanes  0-7  |  8-15
//     lanes  8-15 | 24-31   lanes 16-23 | 24-31
//     16 bytes      16      16 bytes      16
#pragma once

#include "kernels/primitives.cuh"

namespace lowrank_ops {

template <typename ElementType>
struct TensorCores {
  using Element = ElementType;
  using Sum = float;

  // Rows of a 16-row tile of A that a lane addresses: `a_rows` of them.
  static constexpr int a_rows = 1;
  static LOWRANK_OPS_DEVICE int a_row(int lane, int) { return lane % 16; }

  // sum += A B^T over `bytes` of K. a_row: byte offsets from `a` of the rows that this lane addresses; rows of B lie
  // `b_stride` bytes apart.
  template <int M, int N>
  static LOWRANK_OPS_DEVICE void multiply(Sum (&sum)[M][N][4], const unsigned char* a, const int (&a_row)[M][a_rows],
                                          const unsigned char* b, int b_stride, int bytes, int lane) {
    static_assert(N % 2 == 0, "ldmatrix loads two tiles of B at a time");
    a += lane / 16 * 16;
    b += (lane / 16 * 8 + lane % 8) * b_stride + lane / 8 % 2 * 16;
#pragma unroll 2
    for (int k = 0; k < bytes; k += kStepBytes) {
      uint32_t a_matrices[M][4];
#pragma unroll
      for (int m = 0; m < M; ++m) {
        load_matrices(a_matrices[m], a + a_row[m][0] + k);
        round(a_matrices[m]);
      }
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        uint32_t b_matrices[4];
        load_matrices(b_matrices, b + n * 8 * b_stride + k);
        round(b_matrices);
#pragma unroll
        for (int m = 0; m < M; ++m) {
          multiply_add(Element{}, sum[m][n], a_matrices[m], b_matrices[0], b_matrices[1]);
          multiply_add(Element{}, sum[m][n + 1], a_matrices[m], b_matrices[2], b_matrices[3]);
        }
      }
    }
  }

 private:
  // The tensor cores would cut the low bits off.
  static LOWRANK_OPS_DEVICE void round(uint32_t (&words)[4]) {
    if constexpr (sizeof(Element) == 4)
#pragma unroll
      for (uint32_t& word : words) word = round_to_tf32(word);
  }
};

}  // namespace lowrank_ops
