// The emulator of Hopper: csrc/cuda/kernels/hopper.cuh on a CPU. The sm90a kernels run with one host thread per CUDA
// thread, one cluster of CTAs after the other. Indices, layouts, swizzles, descriptors, barriers and their phases are
// as on the GPU. Whatever may happen late does happen late: a load by TMA arrives after a random delay; stores by TMA
// and the products of wgmma read their operands as late as the waits allow. A launch ends with an error at a read of
// data that no proxy fence has made visible, at an address out of bounds, and at a wait that never ends. Not emulated:
// the order of memory accesses among threads, the limit of registers.
//
// Sources: as hopper.cuh.
#pragma once

#include <array>

#include "emulator_threads.h"

// A tensor map: how a tensor lies in memory, for TMA (cuda/kernels/tensor_map.h).
struct CUtensorMap {
  unsigned char* start;
  int axes;
  long sizes[5], strides[5], box[5];  // strides in bytes
};

namespace lowrank_ops::hopper {

// ---- TMA

// The address to which the 128-byte swizzle moves an address.
inline uint32_t swizzle(uint32_t address) {
  return address ^ (address >> 7 & 7) << 4;
}

using BoxPlace = std::array<long, 5>;

// Copies a box, which lies in shared memory as rows of 128 bytes in the swizzle. Returns its bytes.
inline long copy_box(bool store, uint32_t shared, const CUtensorMap& map, const BoxPlace& first) {
  const long count = map.box[0] * map.box[1] * map.box[2] * map.box[3] * map.box[4];
  for (long i = 0; i < count; ++i) {
    long rest = i, offset = 0;
    bool inside = true;
    for (size_t d = 0; d < 5; ++d) {
      const long x = first[d] + rest % map.box[d];
      rest /= map.box[d];
      inside = inside && x >= 0 && x < map.sizes[d];
      offset += x * map.strides[d];
    }
    const uint32_t address = swizzle(shared + uint32_t(i) * 2);
    if (store && inside) std::memcpy(map.start + offset, read_by_proxy(address, 2), 2);
    if (!store && inside) std::memcpy(at(address, 2), map.start + offset, 2);
    if (!store && !inside) std::memset(at(address, 2), 0, 2);
    if (!store) unfenced(address).store(0, std::memory_order_relaxed);
  }
  return count * 2;
}
inline void check_copy(uint32_t shared, const CUtensorMap* map, int axes) {
  if (axes != map->axes) fail("a box of another number of axes than its map");
  if (shared % 1024 != 0) fail("a box at an address that is no multiple of 1024");
}

inline std::atomic<int> loads_under_way{0};
// Bytes that loads have read, per tensor: once for all CTAs that a load reaches.
inline std::mutex loaded_mutex;
inline std::map<const void*, long> loaded;

// A box arrives in the CTA of number `rank`.
inline void arrive(int rank, uint32_t offset, const CUtensorMap& map, uint32_t barrier, const BoxPlace& first) {
  own_rank = rank;
  const long bytes = copy_box(false, shared_base() - kSharedStart + offset, map, first);
  check_reach(rank, barrier);
  barrier_update(rank, barrier, 0, -bytes);
}
// Loads a box into the CTAs of the mask.
inline void load(uint32_t shared, const CUtensorMap* map, uint32_t barrier, uint32_t mask, int axes,
                 const BoxPlace& first) {
  check_copy(shared, map, axes);
  const uint32_t offset = offset_of(shared, 1), counter = offset_of(barrier, 8);
  if (mask == 0) fail("a load into no CTA");
  for (int rank = 0; rank < 16; ++rank)
    if (mask >> rank & 1) check_reach(rank, counter);
  {
    const std::lock_guard<std::mutex> lock(loaded_mutex);
    loaded[map->start] += map->box[0] * map->box[1] * map->box[2] * map->box[3] * map->box[4] * 2;
  }
  static std::atomic<uint32_t> seed{1};
  for (int rank = 0; rank < cluster_size; ++rank) {
    if (!(mask >> rank & 1)) continue;
    const uint32_t delay = (seed++ * 2654435761u >> 16) % 600;
    ++loads_under_way;
    std::thread([=, map = *map, block = blockIdx, thread = threadIdx] {
      std::this_thread::sleep_for(std::chrono::microseconds(delay));
      blockIdx = block;
      threadIdx = thread;
      try {
        arrive(rank, offset, map, counter, first);
      } catch (const Fault&) {
      }
      --loads_under_way;
    }).detach();
  }
}
inline uint32_t own_mask() {
  return 1u << own_rank;
}
inline void load_box(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int a, int b) {
  load(shared, map, barrier, own_mask(), 2, {a, b, 0, 0, 0});
}
inline void load_box(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int a, int b, int c, int d) {
  load(shared, map, barrier, own_mask(), 4, {a, b, c, d, 0});
}

inline void load_box(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int a, int b, int c, int d, int e) {
  load(shared, map, barrier, own_mask(), 5, {a, b, c, d, e});
}
inline void multicast_box(uint32_t shared, const CUtensorMap* map, uint32_t barrier, uint16_t mask, int a, int b) {
  load(shared, map, barrier, mutation.wrong_mask ? own_mask() : mask, 2, {a, b, 0, 0, 0});
}
inline void multicast_box(uint32_t shared, const CUtensorMap* map, uint32_t barrier, uint16_t mask, int a, int b, int c,
                          int d, int e) {
  load(shared, map, barrier, mutation.wrong_mask ? own_mask() : mask, 5, {a, b, c, d, e});
}

// Groups of operations that the issuing thread carries out as late as its waits allow.
class Late {
 public:
  void issue(std::function<void()> work) { open_.push_back(std::move(work)); }
  void commit() {
    groups_.push_back(std::move(open_));
    open_.clear();
  }
  void wait(size_t pending) {
    while (groups_.size() > pending) {
      for (const auto& work : groups_.front()) work();
      groups_.pop_front();
    }
  }
  bool empty() const { return open_.empty() && groups_.empty(); }

 private:
  std::vector<std::function<void()>> open_;
  std::deque<std::vector<std::function<void()>>> groups_;
};
inline thread_local Late stores, products;

inline void store_box(const CUtensorMap* map, uint32_t shared, int a, int b, int c, int d) {
  check_copy(shared, map, 4);
  // It may read at any time from here to its wait: what it stores must not change in between.
  const uint32_t bytes = uint32_t(map->box[0] * map->box[1] * map->box[2] * map->box[3] * 2);
  const std::vector<unsigned char> now(at(shared, bytes), at(shared, bytes) + bytes);
  stores.issue([=, map = *map] {
    if (std::memcmp(now.data(), at(shared, bytes), bytes) != 0) fail("shared memory changes while TMA stores it");
    copy_box(true, shared, map, {a, b, c, d, 0});
  });
}
inline void commit_stores() {
  stores.commit();
}
template <int pending>
void wait_stores_read() {
  if (!mutation.skip_store_wait) stores.wait(pending);
}
inline void wait_stores() {
  stores.wait(0);
}

// ---- Numbers

template <bool half>
float widen(uint16_t bits) {
  if constexpr (half) {
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return float(value);
  }
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
template <bool half>
uint16_t narrow(float value) {
  if constexpr (half) {
    const _Float16 rounded = _Float16(value);
    uint16_t bits;
    std::memcpy(&bits, &rounded, 2);
    return bits;
  }
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return 0x7FFF;
  return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
template <bool half>
uint32_t pack(float low, float high) {
  return narrow<half>(low) | uint32_t(narrow<half>(high)) << 16;
}

template <bool half>
float widen_low(uint32_t both) {
  return widen<half>(uint16_t(both));
}
template <bool half>
float widen_high(uint32_t both) {
  return widen<half>(uint16_t(both >> 16));
}

// ---- wgmma. Descriptors are of matrices in the 128-byte swizzle, without base offset.

inline uint64_t swizzled(uint32_t start, uint32_t stride) {
  return uint64_t((start & 0x3FFFF) >> 4) | uint64_t(1) << 16 | uint64_t((stride & 0x3FFFF) >> 4) << 32 |
         uint64_t(1) << 62;
}
inline uint64_t further(uint64_t matrix, int bytes) {
  if (bytes % 16 != 0) fail("a descriptor moves by multiples of 16 bytes");
  return (matrix & 0xFFFFFFFF00000000) | (uint32_t(matrix) + uint32_t(bytes / 16));
}
template <bool half>
float element(uint64_t matrix, int row, int k) {
  if (matrix >> 62 != 1 || (matrix >> 49 & 7) != 0) fail("a descriptor of another layout");
  // 18 bits: the address within the own CTA.
  const uint32_t start = shared_base() - kSharedStart + (uint32_t(matrix & 0x3FFF) << 4),
                 stride = uint32_t(matrix >> 32 & 0x3FFF) << 4;
  const uint32_t address = swizzle(start + uint32_t(row / 8) * stride + uint32_t(row % 8 * 128 + k * 2));
  uint16_t value;
  std::memcpy(&value, read_by_proxy(address, 2), 2);
  return widen<half>(value);
}
// `a`: the two rows of A that the lane's sums belong to.
template <bool half, int count>
void product(float (&sums)[count], const float (&a)[2][16], uint64_t b) {
  for (int j = 0; j < count / 4; ++j)
    for (int e = 0; e < 2; ++e)
      for (int k = 0; k < 16; ++k) {
        const float value = element<half>(b, 8 * j + threadIdx.x % 4 * 2 + e, k);
        sums[4 * j + e] += a[0][k] * value;
        sums[4 * j + 2 + e] += a[1][k] * value;
      }
}
template <bool half, int count>
void wgmma(float (&sums)[count], uint64_t a, uint64_t b) {
  products.issue([&sums, a, b] {
    const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    float rows[2][16];
    for (int upper = 0; upper < 2; ++upper)
      for (int k = 0; k < 16; ++k) rows[upper][k] = element<half>(a, row + 8 * upper, k);
    product<half>(sums, rows, b);
  });
}
template <bool half, int count>
void wgmma(float (&sums)[count], const uint32_t (&a)[4], uint64_t b) {
  products.issue([&sums, &a, b] {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    std::memcpy(own_cta().exchange[warp][lane], a, 16);
    __syncwarp();
    float rows[2][16];
    for (int upper = 0; upper < 2; ++upper)
      for (int k = 0; k < 16; ++k) {
        const uint32_t pair = own_cta().exchange[warp][lane / 4 * 4 + k % 8 / 2][upper + k / 8 * 2];
        rows[upper][k] = widen<half>(uint16_t(k % 2 ? pair >> 16 : pair));
      }
    __syncwarp();
    product<half>(sums, rows, b);
  });
}
inline void wgmma_fence() {}
inline void wgmma_commit() {
  products.commit();
}
template <int pending>
void wgmma_wait() {
  if (mutation.early_release && pending > 0) return;
  products.wait(pending);
  __syncwarp();
}
template <class Values>
void pin(Values&) {}

// ---- Between registers and shared memory

template <bool transposed>
void store_matrices_of(uint32_t row, const uint32_t* values, int count) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  own_cta().exchange[warp][lane][4] = row;
  __syncwarp();
  for (int i = 0; i < count; ++i)
    for (int e = 0; e < 2; ++e) {
      const uint16_t value = uint16_t(e ? values[i] >> 16 : values[i]);
      const int pair = lane % 4 * 2 + e, of_row = transposed ? pair : lane / 4, column = transposed ? lane / 4 : pair;
      const uint32_t start = own_cta().exchange[warp][8 * i + of_row][4];
      if (start % 16 != 0) fail("a row of stmatrix that is no multiple of 16 bytes");
      write_shared(start + uint32_t(column) * 2, &value, 2);
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
inline void store_shared(uint32_t address, float value) {
  write_shared(address, &value, 4);
}
inline void load_shared(uint32_t address, float& a, float& b) {
  if (address % 8 != 0) fail("a pair at an address that is no multiple of 8");
  std::memcpy(&a, at(address, 8), 4);
  std::memcpy(&b, at(address, 8) + 4, 4);
}
inline void load_shared(uint32_t address, float& a, float& b, float& c, float& d) {
  if (address % 16 != 0) fail("a vector at an address that is no multiple of 16");
  load_shared(address, a, b);
  load_shared(address + 8, c, d);
}
inline uint32_t load_shared_word(uint32_t address) {
  uint32_t word;
  std::memcpy(&word, at(address, 4), 4);
  return word;
}
// What ordinary stores may write to.
inline std::pair<uintptr_t, uintptr_t> writable{0, 0};
inline void store_global(uint16_t* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) fail("a store to global memory that is no multiple of 16 bytes");
  const uintptr_t start = reinterpret_cast<uintptr_t>(to);
  if (start < writable.first || start + 16 > writable.second) fail("a store to global memory outside of the output");
  const uint32_t values[4] = {a, b, c, d};
  std::memcpy(to, values, 16);
}
template <int count>
void take_registers() {}
template <int count>
void give_registers() {}

// ---- A launch

// A thread of a CTA, from its beginning to its end.
template <typename Params>
void run_thread(void (*kernel)(Params), const Params& params, int block, int rank, int thread) {
  blockIdx.x = block;
  threadIdx.x = thread;
  own_rank = rank;
  try {
    kernel(params);
    if (!stores.empty() || !products.empty()) fail("a thread ends before its stores or products");
  } catch (const Fault&) {
  }
  --own_cta().running;
}

// After the last copy: all announced bytes have arrived, and no others.
inline void check_counts(int rank) {
  own_rank = rank;
  for (const auto& [offset, state] : own_cta().mbarriers)
    if (state.bytes != 0)
      fail("mbarrier " + std::to_string(offset - kSharedStart) + " has " + std::to_string(state.bytes) +
           " bytes to wait for at the end");
}

// Runs one cluster of CTAs after the other. False: there was a fault, which `fault` describes.
template <typename Params>
bool run_ctas(void (*kernel)(Params), int count, int threads, int shared_bytes, const Params& params, int cluster = 1) {
  faulty = false;
  fault.clear();
  loaded.clear();
  gridDim.x = count;
  cluster_size = cluster;
  shared_end = kSharedStart + uint32_t(shared_bytes);
  if (shared_bytes > int(kSharedBytes)) fault = "more shared memory than a CTA can have";
  if (cluster < 1 || cluster > kMostCtas || count % cluster != 0) fault = "a grid that is no multiple of the clusters";
  if (!fault.empty()) return false;
  for (int block = 0; block < count && !faulty; block += cluster) {
    cluster_meeting.reset("the barrier of the cluster", cluster * threads);
    for (int rank = 0; rank < cluster; ++rank) ctas[rank].begin(threads);
    std::vector<std::thread> running;
    for (int i = 0; i < cluster * threads; ++i)
      running.emplace_back([&, i] { run_thread(kernel, params, block + i / threads, i / threads, i % threads); });
    for (std::thread& thread : running) thread.join();
    while (loads_under_way > 0) std::this_thread::sleep_for(std::chrono::microseconds(200));
    try {
      for (int rank = 0; rank < cluster && !faulty; ++rank) check_counts(rank);
    } catch (const Fault&) {
    }
  }
  return !faulty;
}

}  // namespace lowrank_ops::hopper
