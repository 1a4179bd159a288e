// The threads of an emulated CTA of Hopper, one host thread each: their shared memory, their barriers, and the first
// fault.
//
// The first fault ends the launch: the thread that finds it throws; threads that wait are woken and throw, too.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#define LOWRANK_OPS_HOPPER inline
#define __global__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shfl_sync(mask, value, lane) (value)

struct EmulatedDimension {
  int x;
};
inline thread_local EmulatedDimension threadIdx;
inline EmulatedDimension blockIdx, gridDim;

namespace lowrank_ops::hopper {

// Ways in which a test breaks the launch, which must then be noticed.
struct Mutation {
  int skip_fence_proxy = 0;    // 1: leaves out every fence.proxy
  int skip_group_barrier = 0;  // n: leaves out the n-th group barrier of a tile, counted from 1
  int early_release = 0;       // a slot is given back before its products are done: wgmma_wait does nothing
  int skip_store_wait = 0;     // TMA's stores are not waited for
  int short_expect = 0;        // a phase expects 128 bytes less
  int skip_both_barrier = 0;   // leaves out the barrier of two warpgroups
};
inline Mutation mutation;

// The time after which a wait counts as endless. It is long, because the machine may be busy with other work.
inline std::chrono::seconds patience() {
  return std::chrono::seconds(mutation.short_expect ? 3 : 120);
}
struct Fault {};
inline std::mutex machine_mutex;
inline std::condition_variable machine_changed;
inline std::string fault;  // text of the first fault
inline std::atomic<bool> faulty{false};

[[noreturn]] inline void fail(const std::string& what) {
  {
    const std::lock_guard<std::mutex> lock(machine_mutex);
    if (!faulty) fault = "CTA " + std::to_string(blockIdx.x) + " thread " + std::to_string(threadIdx.x) + ": " + what;
    faulty = true;
  }
  machine_changed.notify_all();
  throw Fault{};
}
// Waits until `ready`, with the lock held.
template <typename Ready>
void wait_until(std::unique_lock<std::mutex>& lock, const std::string& what, const Ready& ready) {
  const bool done = machine_changed.wait_for(lock, patience(), [&] { return faulty || ready(); });
  if (faulty) throw Fault{};
  if (done) return;
  lock.unlock();
  fail("a wait without end: " + what);
}

// A barrier of a fixed number of threads.
class Meeting {
 public:
  void reset(int count) { count_ = count, here_ = 0; }
  void wait() {
    std::unique_lock<std::mutex> lock(machine_mutex_);
    const uint64_t now = generation_;
    if (++here_ == count_) {
      here_ = 0;
      ++generation_;
      changed_.notify_all();
      return;
    }
    const auto limit = std::chrono::steady_clock::now() + patience();
    while (now == generation_) {
      changed_.wait_for(lock, std::chrono::milliseconds(50));
      if (faulty) throw Fault{};
      if (std::chrono::steady_clock::now() > limit) {
        lock.unlock();
        fail("a barrier that not all threads reach");
      }
    }
  }

 private:
  std::mutex machine_mutex_;
  std::condition_variable changed_;
  int count_ = 0, here_ = 0;
  uint64_t generation_ = 0;
};
inline Meeting cta_meeting, both_groups, warp_meetings[32], group_meetings[4];

// ---- Shared memory. It begins at address 1024, full of NaN.

constexpr uint32_t kSharedStart = 1024, kSharedBytes = 232448;
alignas(1024) inline unsigned char shared_storage[kSharedStart + kSharedBytes];
inline uint32_t shared_end = 0;  // end of the launch's shared memory
// Per 16 bytes: 1 + the number of the thread whose write there the asynchronous proxy (wgmma, TMA) may not see yet; 0:
// none.
inline std::atomic<uint16_t> unfenced[(kSharedStart + kSharedBytes) / 16];
inline thread_local std::vector<uint32_t> own_writes;

inline uint32_t shared_base() {
  return kSharedStart;
}
inline unsigned char* at(uint32_t address, uint32_t bytes) {
  if (address < kSharedStart || address + bytes > shared_end)
    fail("address " + std::to_string(address) + " outside of shared memory");
  return shared_storage + address;
}
// A write by the calling thread.
inline void write_shared(uint32_t address, const void* value, uint32_t bytes) {
  std::memcpy(at(address, bytes), value, bytes);
  unfenced[address / 16].store(uint16_t(threadIdx.x + 1), std::memory_order_relaxed);
  own_writes.push_back(address / 16);
}
// A read by wgmma or TMA.
inline const unsigned char* read_by_proxy(uint32_t address, uint32_t bytes) {
  const unsigned char* const found = at(address, bytes);
  if (unfenced[address / 16].load(std::memory_order_relaxed) != 0)
    fail("the asynchronous proxy reads what thread " + std::to_string(unfenced[address / 16] - 1) +
         " wrote without fence.proxy.async");
  return found;
}
inline void fence_proxy() {
  if (mutation.skip_fence_proxy) return;
  for (const uint32_t unit : own_writes) unfenced[unit].store(0, std::memory_order_relaxed);
  own_writes.clear();
}
inline void group_barrier(int group) {
  static thread_local int passed = 0;
  const int skipped = mutation.skip_group_barrier;
  if (skipped != 0 && ++passed % 6 == skipped - 1) return;
  group_meetings[group].wait();
  // Before a barrier that is left out the first warp is late, so that the others do not find its work done by chance;
  // every other time the others are.
  const bool first_warp = threadIdx.x % 128 < 32, others_late = passed / 6 % 2 == 1;
  if (skipped != 0 && (passed + 1) % 6 == skipped - 1 && first_warp != others_late)
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
}

inline void both_groups_barrier() {
  if (!mutation.skip_both_barrier) both_groups.wait();
}

// ---- mbarriers, named by their addresses

struct Mbarrier {
  int count = 0, pending = 0;
  long bytes = 0;
  uint32_t phase = 0;
};
inline std::map<uint32_t, Mbarrier> mbarriers;

inline void barrier_init(uint32_t barrier, uint32_t count) {
  at(barrier, 8);
  const std::unique_lock<std::mutex> lock(machine_mutex);
  mbarriers[barrier] = {int(count), int(count), 0, 0};
}
inline void barrier_init_done() {}
// Counts `arrivals` arrivals, and `bytes` more bytes to wait for (negative: bytes that have arrived).
inline void barrier_update(uint32_t barrier, int arrivals, long bytes) {
  const char* wrong = nullptr;
  {
    const std::lock_guard<std::mutex> lock(machine_mutex);
    const auto found = mbarriers.find(barrier);
    if (found == mbarriers.end()) {
      wrong = "no barrier at that address";
    } else {
      Mbarrier& state = found->second;
      state.pending -= arrivals;
      state.bytes += bytes;
      if (state.pending < 0) wrong = "more arrivals than the barrier's count";
      if (state.pending == 0 && state.bytes == 0) {
        state.phase ^= 1;
        state.pending = state.count;
      }
    }
  }
  if (wrong) fail(wrong);
  machine_changed.notify_all();
}
inline void barrier_arrive(uint32_t barrier) {
  barrier_update(barrier, 1, 0);
}
inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
  barrier_update(barrier, 1, long(bytes) - (mutation.short_expect ? 128 : 0));
}
inline void wait_phase(uint32_t barrier, uint32_t parity) {
  std::unique_lock<std::mutex> lock(machine_mutex);
  const auto found = mbarriers.find(barrier);
  if (found == mbarriers.end()) {
    lock.unlock();
    fail("no barrier at that address");
  }
  wait_until(lock, "mbarrier " + std::to_string(barrier - kSharedStart) + ", parity " + std::to_string(parity),
             [&] { return found->second.phase != parity; });
}

}  // namespace lowrank_ops::hopper

inline void __syncthreads() {
  lowrank_ops::hopper::cta_meeting.wait();
}
inline void __syncwarp() {
  lowrank_ops::hopper::warp_meetings[threadIdx.x / 32].wait();
}
