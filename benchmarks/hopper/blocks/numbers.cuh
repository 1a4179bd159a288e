// Inputs and weights of the blocks, the comparison with the reference, and how a variant is described. For the device
// program and for the emulator.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "machine.cuh"

namespace hopper {

// The problem of both blocks: 32 images of 56x56 pixels with 256 channels, bf16, channels_last.
constexpr int kImages = 32, kSize = 56, kChannels = 256;
constexpr size_t kImageValues = size_t(kSize) * kSize * kChannels;

// A kernel and its launch. `right`: it computes the block, it is no ablation.
template <class Arguments>
struct Variant {
  const char* name;
  void (*kernel)(Arguments);
  int threads, shared;
  bool right;
  int profiled_groups = 0;  // warpgroups that write a profile
};

#ifdef EMULATE
#define BOTH inline
#else
#define BOTH __host__ __device__ inline
#endif

// The input is a hash of the index, so that device and host make the same without copies.
BOTH uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  return x ^ x >> 16;
}
// In [-1, 1), of 2^-7 steps: exact in bf16.
BOTH float input_value(uint32_t index) {
  return float(int(mix(index + 0x9E3779B9u) >> 24) - 128) / 128.0f;
}
// The bits of a float that is exact in bf16.
BOTH uint16_t high_half(float value) {
  union {
    float f;
    uint32_t u;
  } both;
  both.f = value;
  return uint16_t(both.u >> 16);
}

// bf16 as its 16 bits, rounded to nearest even, and back.
inline uint16_t bf16_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
inline float bf16_value(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
inline float rounded(float value) {
  return bf16_value(bf16_bits(value));
}
// In [-scale, scale), the same in every run.
inline std::vector<uint16_t> random_weights(size_t count, unsigned seed, float scale) {
  std::mt19937 engine(seed);
  std::vector<uint16_t> values(count);
  for (uint16_t& value : values) value = bf16_bits(scale * float(int(engine() >> 8) - (1 << 23)) / float(1 << 23));
  return values;
}
inline std::vector<float> random_bias() {
  std::vector<float> bias;
  for (uint16_t value : random_weights(kChannels, 4, 1)) bias.push_back(bf16_value(value));
  return bias;
}

// Of a matrix of bf16 its transpose, in float.
inline std::vector<float> transposed(const std::vector<uint16_t>& matrix, int rows, int columns) {
  std::vector<float> result(size_t(rows) * columns);
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j) result[size_t(j) * rows + i] = bf16_value(matrix[size_t(i) * columns + j]);
  return result;
}

// Stage 1 of the reference, rounded: rows [top, bottom) of the image, [row][column][rank].
template <int kRank>
std::vector<float> reference_hidden(const std::vector<float>& in_transposed, int image, int top, int bottom) {
  std::vector<float> hidden(size_t(bottom - top) * kSize * kRank);
  for (int pixel = top * kSize; pixel < bottom * kSize; ++pixel) {
    float sums[kRank] = {};
    const uint32_t start = uint32_t((size_t(image) * kSize * kSize + size_t(pixel)) * kChannels);
    for (int c = 0; c < kChannels; ++c) {
      const float value = input_value(start + uint32_t(c));
      const float* row = &in_transposed[size_t(c) * kRank];
      for (int r = 0; r < kRank; ++r) sums[r] += value * row[r];
    }
    for (int r = 0; r < kRank; ++r) hidden[size_t(pixel - top * kSize) * kRank + r] = rounded(sums[r]);
  }
  return hidden;
}

// How far a result is from the reference.
struct Errors {
  double largest = 0, largest_expected = 0, squares = 0, expected_squares = 0;
  long long differing = 0, bad = 0, values = 0;  // differing: other bits than the rounded reference; bad: far off
  void add(uint16_t bits, float expected) {
    const double got = bf16_value(bits), difference = std::fabs(got - double(expected));
    ++values;
    differing += bits != bf16_bits(expected);
    bad += !(difference <= 0.03 + 0.01 * std::fabs(double(expected)));
    if (difference <= 1e30) largest = std::max(largest, difference), squares += difference * difference;
    largest_expected = std::max(largest_expected, std::fabs(double(expected)));
    expected_squares += double(expected) * double(expected);
  }
  double max_error() const { return largest / largest_expected; }
  double frobenius() const { return std::sqrt(squares / expected_squares); }
  bool right() const { return bad == 0 && values > 0 && frobenius() < 0.006; }
};

}  // namespace hopper
