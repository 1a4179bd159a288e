// TMA: are boxes right that cross the border of the image, and how fast are boxes of several shapes?
#include <string>
#include <vector>

#include "host.cuh"
#include "tma.cuh"

namespace hopper {
namespace {

// Copies one box to shared memory, and from there to out.
__global__ void __launch_bounds__(128) tma_box_kernel(const __grid_constant__ CUtensorMap map, Box box, int c, int x,
                                                      int y, int n, uint32_t bytes, uint4* out) {
  const uint32_t base = shared_base(), barrier = base + 16 * 1024;
  fill_shared(base, out, int(bytes) / 16);  // the host's marks, all of which the copy must overwrite
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    barrier_init_done();
  }
  fence_proxy();
  __syncthreads();
  if (threadIdx.x == 0) {
    barrier_expect(barrier, bytes);
    if (box == Box::k8x8)
      tma_load_5d(base, &map, barrier, 0, x, y, c / 8, n);
    else
      tma_load_4d(base, &map, barrier, c, x, y, n);
  }
  barrier_wait(barrier, 0);
  const uint4* shared = reinterpret_cast<const uint4*>(shared_memory);
  for (int i = int(threadIdx.x); i < int(bytes) / 16; i += 128) out[i] = shared[i];
}

// The number of elements of a 10x10 box at (c, x, y, n) that are wrong.
int box_differences(Box box, const std::vector<uint16_t>& got, const std::vector<uint16_t>& image, int size,
                    int channels, int c, int x, int y, int n) {
  int differences = 0;
  const int inner = box == Box::k8 ? 8 : 64;
  for (int pixel = 0; pixel < kPixels; ++pixel)
    for (int i = 0; i < inner; ++i) {
      const int row = y + pixel / kHalo, column = x + pixel % kHalo;
      const bool inside = row >= 0 && row < size && column >= 0 && column < size;
      const uint16_t expected =
          inside ? image[((size_t(n) * size + row) * size + column) * size_t(channels) + c + i] : uint16_t(0);
      size_t at = size_t(pixel) * inner + i;
      if (box == Box::k64Swizzled) at = size_t(pixel) * 64 + ((i / 8) ^ (pixel % 8)) * 8 + i % 8;
      if (box == Box::k8x8) at = (size_t(i / 8) * kPixels + pixel) * 8 + i % 8;
      differences += got[at] != expected;
    }
  return differences;
}

}  // namespace

void test_tma_border() {
  constexpr int kSize = 30, kChannels = 128, kChannel = 64, kImage = 1;
  const auto image = random_bf16(size_t(2) * kSize * kSize * kChannels, 6);
  uint16_t* image_device = upload(image);
  const int starts[5][2] = {{-1, -1}, {kSize - 9, kSize - 9}, {-1, kSize - 9}, {kSize - 9, -1}, {11, 7}};  // x, y
  for (Box box : {Box::k64, Box::k64Swizzled, Box::k8, Box::k8x8})
    attempt(kBoxNames[int(box)], [&] {
      const CUtensorMap map = tensor_map(box, image_device, 2, kSize, kSize, kChannels, kHalo, kHalo);
      const int elements = kPixels * (box == Box::k8 ? 8 : 64);
      std::vector<double> differences;
      for (const auto& start : starts) {
        uint16_t* out = upload(std::vector<uint16_t>(size_t(elements), 0x5555));
        launch({1, 128, 17 * 1024}, tma_box_kernel, map, box, kChannel, start[0], start[1], kImage, elements * 2,
               reinterpret_cast<uint4*>(out));
        const auto got = download(out, size_t(elements));
        differences.push_back(box_differences(box, got, image, kSize, kChannels, kChannel, start[0], start[1], kImage));
        if (differences.back() != 0) report.wrong();
      }
      report.list(std::string(kBoxNames[int(box)]) + "_differences", differences);
    });
}

namespace {

// Every CTA loads tiles of 64 channels of 14x8 pixels into a ring of shared memory, over and over.
constexpr int kTileHeight = 14, kTileWidth = 8, kImageSize = 56, kImageChannels = 256;
constexpr int kTilesPerImage = (kImageSize / kTileHeight) * (kImageSize / kTileWidth) * (kImageChannels / 64);
constexpr int kTileBytes = kTileHeight * kTileWidth * 128, kRing = 8;

template <Box box>
__global__ void __launch_bounds__(32, 1)
    tma_rate_kernel(const __grid_constant__ CUtensorMap map, int distinct, int loads) {
  const uint32_t base = shared_base(), barriers = base + kRing * kTileBytes;
  if (threadIdx.x != 0) return;
  for (int i = 0; i < kRing; ++i) barrier_init(barriers + i * 8, 1);
  barrier_init_done();
  const int count = (loads - int(blockIdx.x) + int(gridDim.x) - 1) / int(gridDim.x);
  for (int i = 0; i < count; ++i) {
    const uint32_t barrier = barriers + i % kRing * 8, shared = base + i % kRing * kTileBytes;
    if (i >= kRing) barrier_wait(barrier, (i / kRing - 1) % 2);
    const int tile = int((blockIdx.x + int64_t(i) * gridDim.x) % distinct);
    const int c = tile % 4 * 64, x = tile / 4 % 7 * kTileWidth, y = tile / 28 % 4 * kTileHeight;
    const int n = tile / kTilesPerImage;
    barrier_expect(barrier, kTileBytes);
    if constexpr (box == Box::k8x8) {
      tma_load_5d(shared, &map, barrier, 0, x, y, c / 8, n);
    } else if constexpr (box == Box::k8) {
      for (int part = 0; part < 8; ++part)
        tma_load_4d(shared + part * (kTileBytes / 8), &map, barrier, c + part * 8, x, y, n);
    } else {
      tma_load_4d(shared, &map, barrier, c, x, y, n);
    }
  }
  for (int i = count > kRing ? count - kRing : 0; i < count; ++i) barrier_wait(barriers + i % kRing * 8, i / kRing % 2);
}

template <Box box>
void tma_rate(void* images, int count) {
  const std::string name = kBoxNames[int(box)];
  attempt(name, [&] {
    const CUtensorMap map =
        tensor_map(box, images, count, kImageSize, kImageSize, kImageChannels, kTileHeight, kTileWidth);
    const Launch how{multiprocessors(), 32, kRing * kTileBytes + 1024};
    const int loads = count * kTilesPerImage / 2;
    for (const bool l2 : {false, true}) {
      const int distinct = l2 ? 8 * kTilesPerImage : count * kTilesPerImage;
      // From memory: all tiles once, which are more than L2 holds. From L2: the same 13 MB again and again.
      const int loads_now = l2 ? loads : count * kTilesPerImage;
      const double ms = median_ms([&] { launch(how, tma_rate_kernel<box>, map, distinct, loads_now); }, 3);
      report.number(name + (l2 ? "_l2_gbps" : "_hbm_gbps"), double(loads_now) * kTileBytes / ms * 1e-6);
    }
  });
}

}  // namespace

void test_tma_rate() {
  constexpr int kImages = 640;  // 1.03 GB
  uint16_t* images = allocate<uint16_t>(size_t(kImages) * kImageSize * kImageSize * kImageChannels);
  tma_rate<Box::k64Swizzled>(images, kImages);
  tma_rate<Box::k64>(images, kImages);
  tma_rate<Box::k8x8>(images, kImages);
  tma_rate<Box::k8>(images, kImages);
}

}  // namespace hopper
