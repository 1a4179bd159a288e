// Products of a warp on tensor cores by mma.sync (Ampere and all later architectures): bf16, fp16, and fp32 rounded to
// tf32.
//
// A warp multiplies A [16 * M, K] by B [8 * N, K] transposed, both with K contiguous in shared memory. K goes in steps
// of 32 bytes: 16 elements of 2 bytes or 8 of 4; ldmatrix and mma take the same addresses for both. One ldmatrix loads
// four matrices of 8 rows x 16 bytes, and each lane gives the address of one row:
//
//     A tile, 16 rows       B, two tiles of 8 columns (rows in memory)
//     lanes  0-7  | 16-23   lanes  0-7  |  8-15
//     lanes  8-15 | 24-31   lanes 16-23 | 24-31
//     16 bytes      16      16 bytes      16
#pragma once

#include <type_traits>

#include "cuda/kernels/primitives.cuh"

namespace lowrank_ops {

template <typename ElementType>
struct TensorCores {
  using Element = ElementType;
  using Sum = float;

  // A lane addresses `a_rows` rows of a 16-row tile of A; number `i` of them is row a_row(lane, i).
  static constexpr int a_rows = 1;
  static LOWRANK_OPS_DEVICE int a_row(int lane, int) { return lane % 16; }

  // sum += A B^T over `bytes` bytes of K. a_row: byte offsets from `a` of the rows that this lane addresses. Rows of B
  // lie `b_stride` bytes apart from `b` on. `hidden`: A is a hidden tile, written by hidden_pair.
  template <bool hidden, int M, int N>
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
        if constexpr (!hidden) round(a_matrices[m]);
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

  // For multiply_lean: the lane's offsets from a row of A, and from the first of its warp's rows of B.
  static LOWRANK_OPS_DEVICE int a_column(int lane) { return lane / 16 * 16; }
  static LOWRANK_OPS_DEVICE int b_place(int lane, int b_stride) {
    return (lane / 16 * 8 + lane % 8) * b_stride + lane / 8 % 2 * 16;
  }

  // Like multiply, with addresses that include the lane's offsets. Runs four steps of K at a time where it can, as
  // ranks of 64 and 128 in 16 bits allow: one address per tile of A and per two tiles of B, constants for the steps.
  template <bool hidden, int M, int N>
  static LOWRANK_OPS_DEVICE void multiply_lean(Sum (&sum)[M][N][4], SharedAddress a, const int (&a_row)[M][a_rows],
                                               SharedAddress b, int b_stride, int bytes) {
    SharedAddress a_tile[M], b_tile[N / 2];
#pragma unroll
    for (int m = 0; m < M; ++m) a_tile[m] = a + a_row[m][0];
#pragma unroll
    for (int n = 0; n < N / 2; ++n) b_tile[n] = b + n * 16 * b_stride;
    const auto steps = [&](auto count) {
#pragma unroll
      for (int k = 0; k < decltype(count)::value; ++k) step<hidden>(sum, a_tile, b_tile, k * kStepBytes);
      bytes -= decltype(count)::value * kStepBytes;
#pragma unroll
      for (SharedAddress& tile : a_tile) tile += decltype(count)::value * kStepBytes;
#pragma unroll
      for (SharedAddress& tile : b_tile) tile += decltype(count)::value * kStepBytes;
    };
#pragma unroll 1
    while (bytes >= 4 * kStepBytes) steps(std::integral_constant<int, 4>{});
    if (bytes >= 2 * kStepBytes) steps(std::integral_constant<int, 2>{});
    if (bytes >= kStepBytes) steps(std::integral_constant<int, 1>{});
  }

  static LOWRANK_OPS_DEVICE auto narrow_both(Sum first, Sum second) { return narrow_pair<Element>(first, second); }
  // Two elements of the hidden tile, as the next product reads them: fp32 is rounded to tf32 here, once per element,
  // and not wherever a warp reads it.
  static LOWRANK_OPS_DEVICE auto hidden_pair(Sum first, Sum second) {
    auto pair = narrow_both(first, second);
    round(pair.word);
    return pair;
  }

 private:
  // One step of K, `k` bytes behind the addresses.
  template <bool hidden, int M, int N>
  static LOWRANK_OPS_DEVICE void step(Sum (&sum)[M][N][4], const SharedAddress (&a)[M], const SharedAddress (&b)[N / 2],
                                      int k) {
    uint32_t a_matrices[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      load_matrices(a_matrices[m], a[m] + k);
      if constexpr (!hidden) round(a_matrices[m]);
    }
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t b_matrices[4];
      load_matrices(b_matrices, b[n / 2] + k);
      round(b_matrices);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        multiply_add(Element{}, sum[m][n], a_matrices[m], b_matrices[0], b_matrices[1]);
        multiply_add(Element{}, sum[m][n + 1], a_matrices[m], b_matrices[2], b_matrices[3]);
      }
    }
  }

  // Rounds fp32 to tf32; the tensor cores themselves would cut the low bits off.
  template <int count>
  static LOWRANK_OPS_DEVICE void round(uint32_t (&words)[count]) {
    if constexpr (sizeof(Element) == 4)
#pragma unroll
      for (uint32_t& word : words) word = round_to_tf32(word);
  }
};

}  // namespace lowrank_ops
