// The CP block that is measured: sizes, weights, tensor maps, what its kernels take, its reference on the host.
//
//   out = conv1x1(depthwise1x3(depthwise3x1(conv1x1(x)))) + bias, 256 channels everywhere, padding 1, the three hidden
//   tensors rounded to bf16, sums in fp32.
#pragma once

#include <algorithm>
#include <vector>

#include "numbers.cuh"

namespace hopper::cp {

// A tile is 14x8 pixels of the output with a halo of 16x10 = 160 pixels of the input.
constexpr int kRank = 256;
constexpr int kTileHeight = 14, kTileWidth = 8, kHaloWidth = 10, kHaloPixels = 160;
constexpr int kTilesAcross = kSize / kTileWidth, kTilesPerImage = kTilesAcross * (kSize / kTileHeight);

struct Maps {
  CUtensorMap input, in_factor, out_factor_permuted;
};

struct Arguments {
  Maps maps;
  const uint16_t *down, *across;  // [rank][3]
  const float* bias;
  uint16_t* out;
  int tiles, store_anyway;  // the latter 0; keeps the compiler from removing what an ablation does not store
};

struct TilePlace {
  int x, y, n;
};
DEVICE TilePlace tile_place(int tile) {
  const int n = tile / kTilesPerImage, rest = tile - n * kTilesPerImage, row = rest / kTilesAcross;
  return {(rest - row * kTilesAcross) * kTileWidth, row * kTileHeight, n};
}

struct Factors {
  std::vector<uint16_t> in = random_weights(size_t(kRank) * kChannels, 1, 0.1875f);
  std::vector<uint16_t> down = random_weights(size_t(kRank) * 3, 2, 1),
                        across = random_weights(size_t(kRank) * 3, 5, 1);
  std::vector<uint16_t> out = random_weights(size_t(kChannels) * kRank, 3, 0.1083f);
  std::vector<float> bias = random_bias();
};

inline Maps make_maps(const void* input, const void* in_factor, const void* out_factor, int images) {
  const uint64_t n = uint64_t(images);
  Maps maps;
  maps.input =
      tensor_map("input", input, {kChannels, kSize, kSize, n},
                 {kChannels, kSize * kChannels, kSize * kSize * kChannels}, {64, kHaloWidth, kTileHeight + 2, 1});
  maps.in_factor = tensor_map("in_factor", in_factor, {kChannels, kRank}, {kChannels}, {64, 64});
  // Row 32 b + 8 j + 2 q + e of shared memory is row 32 b + 8 q + 2 j + e of out_factor: dimensions e, q, j, b.
  maps.out_factor_permuted = tensor_map("out_factor_permuted", out_factor, {kRank, 2, 4, 4, kChannels / 32},
                                        {kRank, 8 * kRank, 2 * kRank, 32 * kRank}, {64, 2, 4, 4, 2});
  return maps;
}

// `keep` brings a vector to where the kernel reads it.
template <class Keep>
Arguments make_arguments(const Factors& factors, Keep keep, const uint16_t* input, uint16_t* output, int images) {
  return {make_maps(input, keep(factors.in), keep(factors.out), images),
          keep(factors.down),
          keep(factors.across),
          keep(factors.bias),
          output,
          images * kTilesPerImage,
          0};
}

// Three taps of a rank; `at(i)` is what tap i reads, at place + i - 1 of [0, kSize).
template <class At>
float three_taps(const std::vector<uint16_t>& weights, int rank, int place, At at) {
  float sum = 0;
  for (int tap = 0; tap < 3; ++tap)
    if (place + tap - 1 >= 0 && place + tap - 1 < kSize) sum += bf16_value(weights[size_t(rank * 3 + tap)]) * at(tap);
  return rounded(sum);
}

// Rows [first, last) of the output of an image, in float before the last rounding.
inline void reference_rows(const Factors& factors, int image, int first, int last, float* out) {
  const int top = std::max(0, first - 1), bottom = std::min(kSize, last + 1);
  const std::vector<float> out_factor = transposed(factors.out, kChannels, kRank);
  const std::vector<float> hidden =
      reference_hidden<kRank>(transposed(factors.in, kRank, kChannels), image, top, bottom);
  std::vector<float> next(size_t(kSize) * kRank);  // a row
  for (int y = first; y < last; ++y) {
    for (int x = 0; x < kSize; ++x)
      for (int r = 0; r < kRank; ++r)
        next[size_t(x) * kRank + r] = three_taps(
            factors.down, r, y, [&](int tap) { return hidden[(size_t(y + tap - 1 - top) * kSize + x) * kRank + r]; });
    for (int x = 0; x < kSize; ++x) {
      float* result = out + (size_t(y) * kSize + x) * kChannels;
      for (int c = 0; c < kChannels; ++c) result[c] = factors.bias[c];
      for (int r = 0; r < kRank; ++r) {
        const float value =
            three_taps(factors.across, r, x, [&](int tap) { return next[size_t(x + tap - 1) * kRank + r]; });
        const float* row = &out_factor[size_t(r) * kChannels];
        for (int c = 0; c < kChannels; ++c) result[c] += value * row[c];
      }
    }
  }
}

}  // namespace hopper::cp
