// How fast the tensor cores multiply: wgmma with operands in several places and layouts, and mma.sync.
#include <string>

#include "host.cuh"
#include "tensor_cores.cuh"

namespace hopper {
namespace {

// The place and layout of an operand: in registers, or in shared memory (plain: without swizzle; shifted: starting at
// the pixels of the nine taps).
enum class Source { kSwizzled, kSwizzledShifted, kPlain, kPlainShifted, kRegisters };

template <Source source>
DEVICE uint64_t a_descriptor(uint32_t base) {
  if (source == Source::kSwizzled) return descriptor(base, 16, 1024, kSwizzle128);
  if (source == Source::kSwizzledShifted) return descriptor(base, 16, kHalo * 128, kSwizzle128);
  if (source == Source::kPlain) return descriptor(base, kTile * 16, 128, kNoSwizzle);
  return descriptor(base, kPlane, kHalo * 16, kNoSwizzle);
}
// The offset that step k of 16 channels and this tap add to the descriptor, in units of 16 bytes.
template <Source source>
constexpr DEVICE int a_step(int tap, int k) {
  const int pixels = tap / 3 * kHalo + tap % 3;
  if (source == Source::kSwizzled) return k * 2;
  if (source == Source::kSwizzledShifted) return pixels * 8 + k * 2;
  if (source == Source::kPlain) return k * 2 * kTile;
  return pixels + k * 2 * kPixels;
}

// Per iteration, each warpgroup multiplies nine taps of K = 64, as the core of a Tucker layer does.
template <int N, Source a_source, Source b_source>
__global__ void __launch_bounds__(256, 1)
    wgmma_rate_kernel(const uint4* source, float* sink, long long* clocks, int iterations) {
  const uint32_t base = shared_base();
  fill_shared(base, source, (2 * kHiddenBytes + N * 128) / 16);
  fence_proxy();
  __syncthreads();
  const int group = __shfl_sync(~0u, int(threadIdx.x) / 128, 0);
  constexpr bool swizzled = b_source == Source::kSwizzled;
  const uint32_t b_base = base + 2 * kHiddenBytes;
  const uint64_t b = swizzled ? descriptor(b_base, 16, 1024, kSwizzle128) : descriptor(b_base, N * 16, 128, kNoSwizzle);
  const uint64_t a = a_descriptor<a_source>(base + group * kHiddenBytes);
  uint32_t fragments[4][4];
#pragma unroll
  for (int i = 0; i < 16; ++i)
    fragments[i / 4][i % 4] = reinterpret_cast<const uint32_t*>(source)[threadIdx.x * 16 + i];
  float sums[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) sums[i] = 0;
  pin(sums);
  const long long start = clock64();
#pragma unroll 1
  for (int iteration = 0; iteration < iterations; ++iteration) {
    wgmma_fence();
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const uint64_t b_step = advance(b, swizzled ? k * 2 : k * 2 * N);
        if constexpr (a_source == Source::kRegisters)
          wgmma(sums, fragments[k], b_step);
        else
          wgmma(sums, advance(a, a_step<a_source>(tap, k)), b_step);
      }
    wgmma_commit();
    wgmma_wait<1>();
  }
  wgmma_wait<0>();
  pin(sums);
  if (threadIdx.x == 0) clocks[blockIdx.x] = clock64() - start;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) sum += sums[i];
  sink[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

struct RateBuffers {
  const uint4* source;
  float* sink;
  long long* clocks;
  int sms;
  RateBuffers() : sms(multiprocessors()) {
    source = reinterpret_cast<const uint4*>(upload(random_bf16(1 << 18, 5)));
    sink = allocate<float>(size_t(sms) * 1024);
    clocks = allocate<long long>(size_t(sms));
  }
};

// Times a kernel with one CTA per multiprocessor; `flops` and `instructions` count those of one CTA.
void rate(const std::string& key, const RateBuffers& buffers, int threads, int shared, int iterations, double flops,
          double instructions, void (*kernel)(const uint4*, float*, long long*, int)) {
  attempt(key, [&] {
    const Launch how{buffers.sms, threads, shared};
    const double ms = median_ms([&] { launch(how, kernel, buffers.source, buffers.sink, buffers.clocks, iterations); });
    const double clocks = mean(buffers.clocks, buffers.sms);
    report.number(key + "_tflops", flops * buffers.sms / ms * 1e-9);
    report.number(key + "_clk", clocks / instructions);
    report.number(key + "_ghz", clocks / ms * 1e-6);
  });
}

template <int N, Source a, Source b>
void wgmma_rate(const char* name, const RateBuffers& buffers) {
  for (int groups : {1, 2}) {
    const int iterations = 60000 / N / groups;  // about a million clocks
    const double count = double(iterations) * kTaps * 4 * groups;
    rate(std::string(name) + "_n" + std::to_string(N) + "_wg" + std::to_string(groups), buffers, groups * 128, kOneCta,
         iterations, count * 64 * N * 16 * 2, count, wgmma_rate_kernel<N, a, b>);
  }
}
template <Source a, Source b>
void wgmma_rates(const char* name, const RateBuffers& buffers) {
  wgmma_rate<64, a, b>(name, buffers);
  wgmma_rate<128, a, b>(name, buffers);
  wgmma_rate<256, a, b>(name, buffers);
}

}  // namespace

void test_wgmma_rate() {
  const RateBuffers buffers;
  report.text("names", "A_B: layouts of the operands; clk: clocks of a multiprocessor per wgmma, at best N / 2");
  wgmma_rates<Source::kSwizzled, Source::kSwizzled>("swizzled_swizzled", buffers);
  wgmma_rates<Source::kPlain, Source::kPlain>("plain_plain", buffers);
  wgmma_rates<Source::kPlainShifted, Source::kPlain>("plainshifted_plain", buffers);
  wgmma_rates<Source::kPlainShifted, Source::kSwizzled>("plainshifted_swizzled", buffers);
  wgmma_rates<Source::kSwizzledShifted, Source::kSwizzled>("swizzledshifted_swizzled", buffers);
  wgmma_rates<Source::kRegisters, Source::kSwizzled>("registers_swizzled", buffers);
  wgmma_rates<Source::kRegisters, Source::kPlain>("registers_plain", buffers);
}

namespace {

// mma.sync with operands in registers: 64 products per warp and iteration, with 16 independent sums.
__global__ void __launch_bounds__(512, 1)
    mma_rate_kernel(const uint4* source, float* sink, long long* clocks, int iterations) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(source) + threadIdx.x * 24;
  uint32_t a[4][4], b[4][2];
#pragma unroll
  for (int i = 0; i < 16; ++i) a[i / 4][i % 4] = words[i];
#pragma unroll
  for (int i = 0; i < 8; ++i) b[i / 2][i % 2] = words[16 + i];
  float sums[16][4] = {};
  __syncthreads();
  const long long start = clock64();
#pragma unroll 1
  for (int iteration = 0; iteration < iterations; ++iteration)
#pragma unroll
    for (int i = 0; i < 64; ++i) mma(sums[i % 16], a[i % 16 / 4], b[i % 4][0], b[i % 4][1]);
  __syncthreads();
  if (threadIdx.x == 0) clocks[blockIdx.x] = clock64() - start;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 64; ++i) sum += sums[i / 4][i % 4];
  sink[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

// ldmatrix and mma.sync: per iteration a warp multiplies a tile of kRows x 64 with K = 64. It loads the operands of a
// step of K = 16 during the step before. Rows are padded by 16 bytes against bank conflicts.
constexpr int kRowBytes = 128 + 16;

template <int kRows>
struct Fragments {
  uint32_t a[kRows / 16][4], b[4][4];

  DEVICE void load(uint32_t a_row, uint32_t b_row, int k) {
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i) load_matrices(a[i], a_row + i * 16 * kRowBytes + k * 32);
#pragma unroll
    for (int i = 0; i < 4; ++i) load_matrices(b[i], b_row + i * 16 * kRowBytes + k * 32);
  }
};

template <int kRows>
__global__ void __launch_bounds__(384, 1)
    ldmatrix_rate_kernel(const uint4* source, float* sink, long long* clocks, int iterations) {
  const uint32_t base = shared_base();
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  fill_shared(base, source, (64 + int(blockDim.x) / 32 * kRows) * kRowBytes / 16);
  __syncthreads();
  const uint32_t a_row = base + (64 + warp * kRows + lane % 16) * kRowBytes + lane / 16 * 16;
  const uint32_t b_row = base + (lane / 16 * 8 + lane % 8) * kRowBytes + lane / 8 % 2 * 16;
  Fragments<kRows> fragments[2];
  float sums[kRows / 16][8][4] = {};
  const long long start = clock64();
  fragments[0].load(a_row, b_row, 0);
#pragma unroll 1
  for (int iteration = 0; iteration < iterations; ++iteration) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      fragments[(k + 1) % 2].load(a_row, b_row, (k + 1) % 4);
      const Fragments<kRows>& now = fragments[k % 2];
#pragma unroll
      for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) mma(sums[i][j], now.a[i], now.b[j / 2][j % 2 * 2], now.b[j / 2][j % 2 * 2 + 1]);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) clocks[blockIdx.x] = clock64() - start;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kRows * 2; ++i) sum += sums[i / 32][i / 4 % 8][i % 4];
  sink[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

}  // namespace

void test_mma_rate() {
  const RateBuffers buffers;
  constexpr double kFlops = 16 * 8 * 16 * 2;
  report.text("names", "clk: clocks of a multiprocessor per mma.sync m16n8k16; 4 scheduler parts share them");
  for (int warps : {4, 8, 12, 16}) {
    const double count = 2000.0 * 64 * warps;
    rate("registers_warps" + std::to_string(warps), buffers, warps * 32, kOneCta, 2000, count * kFlops, count,
         mma_rate_kernel);
  }
  for (int warps : {4, 8, 12}) {
    const double count = 3000.0 * warps * 4 * 8;  // per 16 rows
    rate("ldmatrix_32x64_warps" + std::to_string(warps), buffers, warps * 32, kOneCta, 3000, count * 2 * kFlops,
         count * 2, ldmatrix_rate_kernel<32>);
    rate("ldmatrix_48x64_warps" + std::to_string(warps), buffers, warps * 32, kOneCta, 3000, count * 3 * kFlops,
         count * 3, ldmatrix_rate_kernel<48>);
  }
}

}  // namespace hopper
