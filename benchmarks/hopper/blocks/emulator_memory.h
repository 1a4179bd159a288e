// The emulator's threads, shared memory, barriers and copy engine.
#pragma once

#include <pthread.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

#define DEVICE inline
#define __global__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shfl_sync(mask, value, lane) (value)

struct Dimension {
  int x;
};
inline thread_local Dimension threadIdx;
inline Dimension blockIdx, gridDim;

namespace hopper {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "block %d thread %d: %s\n", blockIdx.x, threadIdx.x, what);
  std::abort();
}

// Shared memory begins at address 1024.
constexpr uint32_t kSharedStart = 1024;
alignas(1024) inline unsigned char shared_storage[kSharedStart + 232448];
inline uint32_t shared_base() {
  return kSharedStart;
}
inline unsigned char* at(uint32_t address, uint32_t bytes) {
  if (address < kSharedStart || address + bytes > sizeof shared_storage) fail("address outside of shared memory");
  return shared_storage + address;
}
// Where the 128-byte swizzle puts an address.
inline uint32_t swizzle(uint32_t address) {
  return address ^ (address >> 7 & 7) << 4;
}

inline pthread_barrier_t cta_barrier, two_groups, warp_barriers[16], group_barriers[4];
inline void group_barrier(int group) {
  pthread_barrier_wait(&group_barriers[group]);
}
inline void both_barrier() {
  pthread_barrier_wait(&two_groups);
}
inline void fence_proxy() {}

// mbarriers, by their addresses.
struct Mbarrier {
  int count = 0, pending = 0;
  long bytes = 0;
  uint32_t phase = 0;
};
inline std::mutex mbarrier_mutex;
inline std::condition_variable mbarrier_changed;
inline std::map<uint32_t, Mbarrier> mbarriers;

inline void barrier_init(uint32_t barrier, uint32_t count) {
  at(barrier, 8);
  std::lock_guard<std::mutex> lock(mbarrier_mutex);
  if (!mbarriers.insert({barrier, {int(count), int(count), 0, 0}}).second) fail("barrier initialised twice");
}
inline void barrier_init_done() {}
// With the lock held.
inline Mbarrier& mbarrier(uint32_t barrier) {
  const auto found = mbarriers.find(barrier);
  if (found == mbarriers.end()) fail("no barrier there");
  return found->second;
}
// So many arrivals, and so many bytes more to wait for (or, if negative, arrived).
inline void barrier_update(uint32_t barrier, int arrivals, long bytes) {
  std::lock_guard<std::mutex> lock(mbarrier_mutex);
  Mbarrier& state = mbarrier(barrier);
  state.pending -= arrivals;
  state.bytes += bytes;
  if (state.pending < 0) fail("too many arrivals");
  if (state.pending > 0 || state.bytes != 0) return;
  state.phase ^= 1;
  state.pending = state.count;
  mbarrier_changed.notify_all();
}
inline void barrier_arrive(uint32_t barrier) {
  barrier_update(barrier, 1, 0);
}
inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
  barrier_update(barrier, 1, long(bytes));
}
inline void wait_phase(uint32_t barrier, uint32_t parity) {
  std::unique_lock<std::mutex> lock(mbarrier_mutex);
  if (mbarrier_changed.wait_for(lock, std::chrono::seconds(10), [&] { return mbarrier(barrier).phase != parity; }))
    return;
  std::fprintf(stderr, "barrier %u parity %u: ", barrier - kSharedStart, parity);
  fail("a wait without end");
}

}  // namespace hopper

inline void __syncthreads() {
  pthread_barrier_wait(&hopper::cta_barrier);
}
inline void __syncwarp() {
  pthread_barrier_wait(&hopper::warp_barriers[threadIdx.x / 32]);
}

// The copy engine.
struct CUtensorMap {
  char* start;
  int rank;
  long sizes[5], strides[5], box[5];  // strides in bytes
};

namespace hopper {

inline CUtensorMap tensor_map(const char*, const void* start, const std::vector<uint64_t>& sizes,
                              const std::vector<uint64_t>& strides, const std::vector<uint32_t>& box) {
  if (strides.size() + 1 != sizes.size() || box.size() != sizes.size() || box[0] != 64) fail("tensor map");
  CUtensorMap map{static_cast<char*>(const_cast<void*>(start)), int(sizes.size()), {}, {}, {}};
  for (size_t i = 0; i < 5; ++i) {
    const bool used = i < sizes.size();
    map.sizes[i] = used ? long(sizes[i]) : 1;
    map.box[i] = used ? long(box[i]) : 1;
    map.strides[i] = !used ? 0 : i ? long(strides[i - 1]) * 2 : 2;
  }
  return map;
}

using Place = std::array<long, 5>;

// Copies a box, of rows of 128 bytes in the swizzle in shared memory. Returns its bytes.
inline long copy_box(bool store, uint32_t shared, const CUtensorMap& map, const Place& first) {
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
    unsigned char* const here = at(swizzle(shared + uint32_t(i) * 2), 2);
    if (store && inside) std::memcpy(map.start + offset, here, 2);
    if (!store && inside) std::memcpy(here, map.start + offset, 2);
    if (!store && !inside) std::memset(here, 0, 2);
  }
  return count * 2;
}
inline void check_copy(uint32_t shared, const CUtensorMap* map, int rank) {
  if (rank != map->rank || shared % 1024) fail("copy of another rank or not aligned");
}
// Arrives up to 4 ms later.
inline void load(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int rank, const Place& first) {
  check_copy(shared, map, rank);
  static std::atomic<uint32_t> seed{1};
  const uint32_t delay = (seed++ * 2654435761u >> 16) % 4000;
  std::thread([=, map = *map] {
    usleep(delay);
    barrier_update(barrier, 0, -copy_box(false, shared, map, first));
  }).detach();
}
inline void tma_load_2d(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int a, int b) {
  load(shared, map, barrier, 2, {a, b, 0, 0, 0});
}
inline void tma_load_4d(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int c, int x, int y, int n) {
  load(shared, map, barrier, 4, {c, x, y, n, 0});
}
inline void tma_load_5d(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int a, int b, int c, int d, int e) {
  load(shared, map, barrier, 5, {a, b, c, d, e});
}
inline void tma_prefetch_4d(const CUtensorMap*, int, int, int, int) {}
inline void tma_store_4d(const CUtensorMap* map, uint32_t shared, int c, int x, int y, int n) {
  check_copy(shared, map, 4);
  copy_box(true, shared, *map, {c, x, y, n, 0});
}
inline void tma_store_commit() {}
template <int pending>
void tma_store_wait_read() {}
inline void tma_store_wait_all() {}

}  // namespace hopper
