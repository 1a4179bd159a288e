// Executes the kernels of the blocks on the host, a thread per thread of a CTA, one CTA after the other: indices,
// layouts, swizzles, barriers and the order of waits are as on the GPU. Copies arrive late and in any order. Not
// emulated: that wgmma runs later than it is issued, fences, the limit of registers. Every misuse it can see (addresses
// out of shared memory, unaligned copies, a wait that never ends) aborts.
//
//   g++ -std=c++17 -O2 -pthread -DEMULATE -x c++ -o build/emulate_tucker benchmarks/hopper/blocks/tucker.cu
//   build/emulate_tucker [NAME]     one image through all variants that compute the block, or through this one
//
// Likewise cp.cu. Included by machine.cuh, whose functions these are; emulator_memory.h has barriers and copies.
#pragma once

#include "emulator_memory.h"

namespace hopper {

// The values of a lane that the others of its warp read: an operand of wgmma, the address of a row.
inline uint32_t exchange[16][32][5];

inline float bf16_float(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
inline uint16_t float_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
inline uint32_t pack(float low, float high) {
  return float_bf16(low) | uint32_t(float_bf16(high)) << 16;
}
inline float word_as_float(uint32_t word) {
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

// wgmma. A descriptor is of a matrix in the 128-byte swizzle, without base offset.
inline uint64_t swizzled(uint32_t start, uint32_t stride) {
  return uint64_t((start & 0x3FFFF) >> 4) | uint64_t(1) << 16 | uint64_t((stride & 0x3FFFF) >> 4) << 32 |
         uint64_t(1) << 62;
}
inline uint64_t further(uint64_t matrix, int bytes) {
  return (matrix & 0xFFFFFFFF00000000) | (uint32_t(matrix) + uint32_t(bytes / 16));
}
inline float element(uint64_t matrix, int row, int k) {
  if (matrix >> 62 != 1 || ((matrix >> 49) & 7)) fail("descriptor");
  const uint32_t start = uint32_t(matrix & 0x3FFF) << 4, stride = uint32_t((matrix >> 32) & 0x3FFF) << 4;
  const uint32_t address = swizzle(start + uint32_t(row / 8) * stride + uint32_t(row % 8 * 128 + k * 2));
  uint16_t value;
  std::memcpy(&value, at(address, 2), 2);
  return bf16_float(value);
}
// `a` holds the lane's two rows.
template <int count>
void product(float (&sums)[count], const float (&a)[2][16], uint64_t b) {
  for (int j = 0; j < count / 4; ++j)
    for (int e = 0; e < 2; ++e)
      for (int k = 0; k < 16; ++k) {
        const float value = element(b, 8 * j + threadIdx.x % 4 * 2 + e, k);
        sums[4 * j + e] += a[0][k] * value;
        sums[4 * j + 2 + e] += a[1][k] * value;
      }
}
template <int count>
void wgmma(float (&sums)[count], uint64_t a, uint64_t b) {
  const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
  float rows[2][16];
  for (int half = 0; half < 2; ++half)
    for (int k = 0; k < 16; ++k) rows[half][k] = element(a, row + 8 * half, k);
  product(sums, rows, b);
}
template <int count>
void wgmma(float (&sums)[count], const uint32_t (&a)[4], uint64_t b) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  std::memcpy(exchange[warp][lane], a, 16);
  __syncwarp();
  float rows[2][16];
  for (int half = 0; half < 2; ++half)
    for (int k = 0; k < 16; ++k) {
      const uint32_t pair = exchange[warp][lane / 4 * 4 + k % 8 / 2][half + k / 8 * 2];
      rows[half][k] = bf16_float(uint16_t(k % 2 ? pair >> 16 : pair));
    }
  __syncwarp();
  product(sums, rows, b);
}
inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int pending>
void wgmma_wait() {
  __syncwarp();
}
template <class Values>
void pin(Values&) {}

// stmatrix.
template <bool transposed>
void store_matrices_of(uint32_t row, const uint32_t* values, int count) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  exchange[warp][lane][4] = row;
  __syncwarp();
  for (int i = 0; i < count; ++i)
    for (int e = 0; e < 2; ++e) {
      const uint16_t value = uint16_t(e ? values[i] >> 16 : values[i]);
      const int pair = lane % 4 * 2 + e, of_row = transposed ? pair : lane / 4, column = transposed ? lane / 4 : pair;
      std::memcpy(at(exchange[warp][8 * i + of_row][4] + uint32_t(column) * 2, 2), &value, 2);
    }
  __syncwarp();
}
template <bool transposed>
void store_matrices(uint32_t row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  const uint32_t values[4] = {a, b, c, d};
  store_matrices_of<transposed>(row, values, 4);
}
inline void store_matrices_transposed(uint32_t row, uint32_t a, uint32_t b) {
  const uint32_t values[2] = {a, b};
  store_matrices_of<true>(row, values, 2);
}

// Loads and stores.
inline void store_shared(uint32_t address, float value) {
  std::memcpy(at(address, 4), &value, 4);
}
inline void load_shared(uint32_t address, float& a, float& b) {
  if (address % 8) fail("unaligned load");
  std::memcpy(&a, at(address, 8), 4);
  std::memcpy(&b, at(address, 8) + 4, 4);
}
inline void load_shared(uint32_t address, float& a, float& b, float& c, float& d) {
  if (address % 16) fail("unaligned load");
  load_shared(address, a, b);
  load_shared(address + 8, c, d);
}
inline uint32_t load_shared_word(uint32_t address) {
  uint32_t word;
  std::memcpy(&word, at(address, 4), 4);
  return word;
}
inline void store_global(uint16_t* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  if (size_t(to) % 16) fail("unaligned store");
  const uint32_t values[4] = {a, b, c, d};
  std::memcpy(to, values, 16);
}

template <int count>
void take_registers() {}
template <int count>
void give_registers() {}
inline uint32_t now() {
  return 0;
}

}  // namespace hopper
