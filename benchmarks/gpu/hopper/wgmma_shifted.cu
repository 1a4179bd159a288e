// Is wgmma right if A starts anywhere in a tile in shared memory? If so, a 3x3 convolution needs only one copy of its
// input: every tap is a product whose A starts some pixels further on.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "host.cuh"
#include "tensor_cores.cuh"

namespace hopper {
namespace {

constexpr double kTolerance = 1e-3;

// The first pixel that a tap reads.
DEVICE int tap_pixels(int tap) {
  return tap / 3 * kHalo + tap % 3;
}

// Writes the warpgroup's sums to out [64][64].
DEVICE void store_sums(float* out, const float (&sums)[32]) {
  const int row = int(threadIdx.x) / 32 * 16 + int(threadIdx.x) % 32 / 4, column = int(threadIdx.x) % 4 * 2;
#pragma unroll
  for (int i = 0; i < 32; ++i) out[(row + i / 2 % 2 * 8) * kTile + i / 4 * 8 + column + i % 2] = sums[i];
}

// Both operands lie without swizzle: hidden as [8][100 pixels][8], factors as [9][8][64 rows][8]. With `registers`, A
// comes from registers instead, its elements in the places that the sums of another wgmma would have.
template <bool registers>
DEVICE void multiply_tap(float (&sums)[32], const uint32_t* hidden, uint32_t base, int tap) {
  const int row = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const uint32_t b = base + kHiddenBytes + tap * kFactorBytes + k * 2 * kTile * 16;
    const uint64_t b_matrix = descriptor(b, kTile * 16, 128, kNoSwizzle);
    if constexpr (registers) {  // rows lane / 4 and + 8 of the warp's 16 are pixels lane / 4 of two image rows
      const uint32_t* pixel = hidden + (row * 2 * kHalo + lane / 4 + tap_pixels(tap)) * 32 + k * 8 + lane % 4;
      const uint32_t a[4] = {pixel[0], pixel[kHalo * 32], pixel[4], pixel[kHalo * 32 + 4]};
      wgmma_fence();  // the registers of A were just written
      wgmma(sums, a, b_matrix);
      wgmma_commit();
      wgmma_wait<0>();  // before the next elements are written there
    } else {
      const uint32_t a = base + tap_pixels(tap) * 16 + k * 2 * kPlane;
      wgmma(sums, descriptor(a, kPlane, kHalo * 16, kNoSwizzle), b_matrix);
    }
  }
  if constexpr (!registers) {
    wgmma_commit();
    wgmma_wait<0>();
  }
}

// Computes every tap alone, then the sum of all nine: out is [10][64][64].
template <bool registers>
__global__ void __launch_bounds__(128) shifted_kernel(const uint16_t* hidden, const uint16_t* factors, float* out) {
  const uint32_t base = shared_base();
  const uint4 *hidden_vectors = reinterpret_cast<const uint4*>(hidden),
              *factor_vectors = reinterpret_cast<const uint4*>(factors);
  for (int i = int(threadIdx.x); i < kPixels * 8; i += 128)
    store_shared(base + i % 8 * kPlane + i / 8 * 16, hidden_vectors[i]);
  for (int i = int(threadIdx.x); i < kTaps * kTile * 8; i += 128) {
    const int tap = i / (kTile * 8), row = i / 8 % kTile;
    store_shared(base + kHiddenBytes + tap * kFactorBytes + (i % 8 * kTile + row) * 16, factor_vectors[i]);
  }
  fence_proxy();
  __syncthreads();
  const uint32_t* words = reinterpret_cast<const uint32_t*>(hidden);
  float sums[32];
  for (int part = 0; part <= kTaps; ++part) {  // each tap alone, then all
#pragma unroll
    for (int i = 0; i < 32; ++i) sums[i] = 0;
    pin(sums);
    wgmma_fence();
    const int first = part == kTaps ? 0 : part, last = part == kTaps ? kTaps : part + 1;
    for (int tap = first; tap < last; ++tap) {
      wgmma_fence();
      multiply_tap<registers>(sums, words, base, tap);
      pin(sums);
    }
    store_sums(out + part * kTile * kTile, sums);
  }
}

// Adds one product to sums [64, 64], in double. Row m is the pixel start + m / 8 * group + m % 8.
void add_product(std::vector<double>& sums, const std::vector<uint16_t>& hidden, const std::vector<uint16_t>& factors,
                 int tap, int start, int group) {
  for (int m = 0; m < kTile; ++m)
    for (int n = 0; n < kTile; ++n) {
      double sum = 0;
      for (int k = 0; k < kTile; ++k)
        sum += from_bf16(hidden[size_t(start + m / 8 * group + m % 8) * kTile + k]) *
               from_bf16(factors[(size_t(tap) * kTile + n) * kTile + k]);
      sums[size_t(m) * kTile + n] += sum;
    }
}

// The largest difference, relative to the largest expected value; infinite if a result is not finite.
double relative_error(const float* got, const std::vector<double>& expected) {
  double worst = 0, largest = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    if (!std::isfinite(got[i])) return INFINITY;
    worst = std::max(worst, std::fabs(double(got[i]) - expected[i]));
    largest = std::max(largest, std::fabs(expected[i]));
  }
  return worst / largest;
}

}  // namespace

void test_wgmma_shifted() {
  const auto hidden = random_bf16(kPixels * kTile, 1), factors = random_bf16(kTaps * kTile * kTile, 2);
  const uint16_t *hidden_device = upload(hidden), *factors_device = upload(factors);
  constexpr size_t kSums = size_t(kTile) * kTile;
  std::vector<std::vector<double>> expected(kTaps + 1, std::vector<double>(kSums));
  for (int tap = 0; tap < kTaps; ++tap) {
    add_product(expected[tap], hidden, factors, tap, tap / 3 * kHalo + tap % 3, kHalo);
    for (size_t i = 0; i < kSums; ++i) expected[kTaps][i] += expected[tap][i];
  }
  const Launch how{1, 128, kHiddenBytes + kTaps * kFactorBytes};
  const auto run = [&](const char* key, void (*kernel)(const uint16_t*, const uint16_t*, float*)) {
    double worst = INFINITY;
    attempt(key, [&] {
      float* out = allocate<float>((kTaps + 1) * kSums);
      launch(how, kernel, hidden_device, factors_device, out);
      const auto got = download(out, (kTaps + 1) * kSums);
      std::vector<double> errors;
      for (int part = 0; part <= kTaps; ++part)
        errors.push_back(relative_error(got.data() + part * kSums, expected[part]));
      worst = *std::max_element(errors.begin(), errors.end());
      report.number(std::string(key) + "_max_error", worst);
      report.list(std::string(key) + "_errors_taps_then_sum", errors);
    });
    return worst;
  };
  const double right = run("leading_is_k_stride_is_rows", shifted_kernel<false>);
  const double registers = run("a_from_registers", shifted_kernel<true>);
  if (!(right < kTolerance) || !(registers < kTolerance)) report.wrong();
}

namespace {

// The 128-byte swizzle: a pixel is a row of 128 bytes, and its 16 bytes number c are stored at place c ^ (pixel % 8),
// as TMA does.
struct SwizzleCase {
  int shift, group;  // in pixels: where A starts, and the distance between groups of 8 rows
  uint32_t base_offset;
};

// One product for one case per CTA.
__global__ void __launch_bounds__(128)
    swizzle_kernel(const uint16_t* hidden, const uint16_t* factors, const SwizzleCase* cases, float* out) {
  const uint32_t base = shared_base();
  const SwizzleCase test = cases[blockIdx.x];
  const uint4 *hidden_vectors = reinterpret_cast<const uint4*>(hidden),
              *factor_vectors = reinterpret_cast<const uint4*>(factors);
  for (int i = int(threadIdx.x); i < kPixels * 8; i += 128)
    store_shared(base + i / 8 * 128 + ((i % 8) ^ (i / 8 % 8)) * 16, hidden_vectors[i]);
  for (int i = int(threadIdx.x); i < kTile * 8; i += 128)
    store_shared(base + kHiddenBytes + i / 8 * 128 + ((i % 8) ^ (i / 8 % 8)) * 16, factor_vectors[i]);
  fence_proxy();
  __syncthreads();
  float sums[32];
#pragma unroll
  for (int i = 0; i < 32; ++i) sums[i] = 0;
  pin(sums);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const uint64_t a =
        descriptor(base + test.shift * 128 + k * 32, 16, test.group * 128, kSwizzle128, test.base_offset);
    wgmma(sums, a, descriptor(base + kHiddenBytes + k * 32, 16, 1024, kSwizzle128));
  }
  wgmma_commit();
  wgmma_wait<0>();
  pin(sums);
  store_sums(out + size_t(blockIdx.x) * kTile * kTile, sums);
}

}  // namespace

void test_wgmma_swizzle_shifted() {
  const auto hidden = random_bf16(kPixels * kTile, 3), factors = random_bf16(kTile * kTile, 4);
  const std::vector<int> shifts = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 20, 21, 22};
  const char* const bases[3] = {"base_0", "base_is_row", "base_is_minus_row"};
  std::vector<SwizzleCase> cases;
  for (int group : {8, kHalo})
    for (int base = 0; base < 3; ++base)
      for (int shift : shifts)
        cases.push_back({shift, group, uint32_t(base == 0 ? 0 : base == 1 ? shift : -shift) & 7});
  float* out = allocate<float>(cases.size() * kTile * kTile);
  launch({int(cases.size()), 128, kHiddenBytes + kFactorBytes}, swizzle_kernel, upload(hidden), upload(factors),
         upload(cases), out);
  const auto got = download(out, cases.size() * kTile * kTile);
  std::string best;
  for (size_t first = 0; first < cases.size(); first += shifts.size()) {
    std::vector<double> right, errors;
    int taps = 0;
    for (size_t i = first; i < first + shifts.size(); ++i) {
      std::vector<double> expected(size_t(kTile) * kTile);
      add_product(expected, hidden, factors, 0, cases[i].shift, cases[i].group);
      const double error = relative_error(got.data() + i * kTile * kTile, expected);
      errors.push_back(error);
      if (!(error < kTolerance)) continue;
      right.push_back(cases[i].shift);
      taps += cases[i].shift % kHalo < 3;
    }
    const std::string base = bases[first / shifts.size() % 3];
    const std::string key = "stride_" + std::to_string(cases[first].group * 128) + "_" + base;
    report.list(key + "_right_shifts", right);
    report.number(key + "_max_error", *std::max_element(errors.begin(), errors.end()));
    if (first == 0 && (right.empty() || right[0] != 0)) report.wrong();  // not even the unshifted start is right
    if (cases[first].group == kHalo && taps == kTaps && best.empty()) best = base;
  }
  report.list("shifts", std::vector<double>(shifts.begin(), shifts.end()));
  report.text("all_nine_taps_right_with", best.empty() ? "none" : best);
}

}  // namespace hopper
