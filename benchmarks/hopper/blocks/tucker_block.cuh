// The Tucker-2 block that is measured: sizes, weights, tensor maps, what its kernels take, its reference on the host.
//
//   out = conv1x1(conv3x3(conv1x1(x))) + bias, 256 -> 64 -> 64 -> 256 channels, padding 1, the two hidden tensors
//   rounded to bf16, sums in fp32.
#pragma once

#include <algorithm>
#include <vector>

#include "numbers.cuh"

namespace hopper::tucker {

// A tile is 8x8 pixels of the output with a halo of 10x10 pixels of the input.
constexpr int kRank = 64, kCoreTaps = 9;
constexpr int kTileSide = 8, kHaloSide = 10, kHaloPixels = kHaloSide * kHaloSide, kHaloRows = 104;
constexpr int kTilesAcross = kSize / kTileSide, kTilesPerImage = kTilesAcross * kTilesAcross;
constexpr int kSlices = kChannels / 64, kRow = 128;  // bytes of 64 channels
constexpr int kSliceBytes = kHaloPixels * kRow, kSlotBytes = kHaloRows * kRow;
constexpr int kFactorSlice = 64 * kRow;
constexpr int kInBytes = kSlices * kFactorSlice, kCoreBytes = kCoreTaps * kFactorSlice, kOutBytes = kChannels * kRow;
constexpr int kSharedLimit = 232448;

struct Maps {
  CUtensorMap input, in_factor, core, out_factor, out_factor_permuted, output;
};

struct Arguments {
  Maps maps;
  const uint16_t* in_factor;
  const float* bias;
  uint16_t* out;
  int tiles, store_anyway;  // the latter 0; keeps the compiler from removing what an ablation does not store
  uint32_t* profile;
};

struct TilePlace {
  int x, y, n;
};
DEVICE TilePlace tile_place(int tile) {
  const int n = tile / kTilesPerImage, rest = tile - n * kTilesPerImage, row = rest / kTilesAcross;
  return {(rest - row * kTilesAcross) * kTileSide, row * kTileSide, n};
}

struct Factors {
  std::vector<uint16_t> in = random_weights(size_t(kRank) * kChannels, 1, 0.1875f);
  std::vector<uint16_t> core = random_weights(size_t(kRank) * kCoreTaps * kRank, 2, 0.0722f);  // [out][tap][in]
  std::vector<uint16_t> out = random_weights(size_t(kChannels) * kRank, 3, 0.2165f);
  std::vector<float> bias = random_bias();
};

inline Maps make_maps(const void* input, const void* in_factor, const void* core, const void* out_factor, void* output,
                      int images) {
  const uint64_t n = uint64_t(images);
  Maps maps;
  maps.input = tensor_map("input", input, {kChannels, kSize, kSize, n},
                          {kChannels, kSize * kChannels, kSize * kSize * kChannels}, {64, kHaloSide, kHaloSide, 1});
  maps.output = tensor_map("output", output, {kChannels, kSize, kSize, n},
                           {kChannels, kSize * kChannels, kSize * kSize * kChannels}, {64, kTileSide, kTileSide, 1});
  maps.in_factor = tensor_map("in_factor", in_factor, {kChannels, kRank}, {kChannels}, {64, 64});
  maps.out_factor = tensor_map("out_factor", out_factor, {kRank, kChannels}, {kRank}, {64, 64});
  maps.core = tensor_map("core", core, {kCoreTaps * kRank, kRank}, {kCoreTaps * kRank}, {64, 64});
  // Row 32 b + 8 j + 2 q + e of shared memory is row 32 b + 8 q + 2 j + e of out_factor: dimensions e, q, j, b.
  maps.out_factor_permuted = tensor_map("out_factor_permuted", out_factor, {kRank, 2, 4, 4, kChannels / 32},
                                        {kRank, 8 * kRank, 2 * kRank, 32 * kRank}, {64, 2, 4, 4, 2});
  return maps;
}

// `keep` brings a vector to where the kernel reads it.
template <class Keep>
Arguments make_arguments(const Factors& factors, Keep keep, const uint16_t* input, uint16_t* output, int images,
                         uint32_t* profile) {
  const uint16_t* in = keep(factors.in);
  return {make_maps(input, in, keep(factors.core), keep(factors.out), output, images),
          in,
          keep(factors.bias),
          output,
          images * kTilesPerImage,
          0,
          profile};
}

// Rows [first, last) of the output of an image, in float before the last rounding.
inline void reference_rows(const Factors& factors, int image, int first, int last, float* out) {
  const int top = std::max(0, first - 1), bottom = std::min(kSize, last + 1);
  const std::vector<float> core = transposed(factors.core, kRank, kCoreTaps * kRank);
  const std::vector<float> out_factor = transposed(factors.out, kChannels, kRank);
  const std::vector<float> hidden =
      reference_hidden<kRank>(transposed(factors.in, kRank, kChannels), image, top, bottom);
  for (int y = first; y < last; ++y)
    for (int x = 0; x < kSize; ++x) {
      float sums[kRank] = {};
      for (int tap = 0; tap < kCoreTaps; ++tap) {
        const int row = y + tap / 3 - 1, column = x + tap % 3 - 1;
        if (row < 0 || row >= kSize || column < 0 || column >= kSize) continue;
        for (int r1 = 0; r1 < kRank; ++r1) {
          const float value = hidden[(size_t(row - top) * kSize + column) * kRank + r1];
          const float* weights = &core[(size_t(tap) * kRank + r1) * kRank];
          for (int r2 = 0; r2 < kRank; ++r2) sums[r2] += value * weights[r2];
        }
      }
      float* result = out + (size_t(y) * kSize + x) * kChannels;
      for (int c = 0; c < kChannels; ++c) result[c] = factors.bias[c];
      for (int r = 0; r < kRank; ++r) {
        const float value = rounded(sums[r]), *row = &out_factor[size_t(r) * kChannels];
        for (int c = 0; c < kChannels; ++c) result[c] += value * row[c];
      }
    }
}

}  // namespace hopper::tucker
