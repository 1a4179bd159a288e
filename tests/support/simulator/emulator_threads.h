// The threads of an emulated cluster of CTAs of Hopper, one host thread each: their shared memory, their barriers, and
// the first fault.
//
// Addresses in shared memory name the CTA, too: that of number n in its cluster begins at n x 2^24. Ordinary accesses
// and those of wgmma reach the own CTA alone; arrivals at mbarriers and copies by TMA reach the others, from the
// barrier of the cluster on that follows the initialization of their mbarriers (and fence.mbarrier_init), until they
// end.
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
inline thread_local EmulatedDimension threadIdx, blockIdx;
inline EmulatedDimension gridDim;

namespace lowrank_ops::hopper {

// Ways in which a test breaks the launch, which must then be noticed.
struct Mutation {
  int skip_fence_proxy = 0;      // 1: leaves out every fence.proxy
  int skip_group_barrier = 0;    // n: leaves out the n-th group barrier of a tile, counted from 1
  int early_release = 0;         // a slot is given back before its products are done: wgmma_wait does nothing
  int skip_store_wait = 0;       // TMA's stores are not waited for
  int short_expect = 0;          // a phase expects 128 bytes less
  int skip_both_barrier = 0;     // leaves out the barrier of two warpgroups
  int skip_cluster_barrier = 0;  // n: leaves out the n-th barrier of the cluster, counted from 1
  int skip_init_fence = 0;       // leaves out fence.mbarrier_init
  int single_count = 0;          // barriers of the warps of two CTAs count those of one
  int skip_remote_arrive = 0;    // no thread arrives at a barrier of another CTA
  int wrong_mask = 0;            // a multicast reaches its own CTA alone
  int half_expect = 0;           // a phase expects half of its bytes
  int short_patience = 0;        // breaks nothing: waits without end are found soon
};
inline Mutation mutation;

// The time after which a wait counts as endless. It is long, because the machine may be busy with other work.
constexpr int kLongPatience = 120, kShortPatience = 3;
inline std::chrono::seconds patience() {
  return std::chrono::seconds(mutation.short_patience ? kShortPatience : kLongPatience);
}
struct Fault {};
inline std::mutex fault_mutex;
inline std::string fault;  // text of the first fault
inline std::atomic<bool> faulty{false};

[[noreturn]] void fail(const std::string& what);
[[noreturn]] void fail_waiting(const std::string& what);

// A barrier of a fixed number of threads.
class Meeting {
 public:
  void reset(const char* name, int count) { name_ = name, count_ = count, here_ = 0, generation_ = 0; }
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
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
        fail_waiting("a barrier that not all threads reach");
      }
    }
  }
  uint64_t generation() const { return generation_; }
  std::string waiting() const { return here_ == 0 ? "" : " " + std::to_string(here_) + " threads at " + name_ + ","; }

 private:
  const char* name_ = "";
  std::mutex mutex_;
  std::condition_variable changed_;
  int count_ = 0;
  std::atomic<int> here_{0};
  std::atomic<uint64_t> generation_{0};
};

// ---- The CTAs of a cluster, which run together

constexpr uint32_t kSharedStart = 1024, kSharedBytes = 232448;
constexpr int kMostCtas = 2, kMostThreads = 1024;

struct Mbarrier {
  int count = 0, pending = 0;
  long bytes = 0;
  uint32_t phase = 0;
  int waiting = 0;  // threads
  // Other CTAs may use it from this meeting of the cluster on; -1: fence.mbarrier_init has not followed yet.
  int64_t published = -1;
};

struct Cta {
  alignas(1024) unsigned char storage[kSharedStart + kSharedBytes];
  // Per 16 bytes: 1 + the number of the thread whose write there the asynchronous proxy (wgmma, TMA) may not see yet;
  // 0: none.
  std::atomic<uint16_t> unfenced[(kSharedStart + kSharedBytes) / 16];
  std::mutex mutex;  // of the mbarriers
  std::condition_variable changed;
  std::map<uint32_t, Mbarrier> mbarriers;
  Meeting all, both_groups, warps[kMostThreads / 32], groups[4];
  // Values that a lane shows to the other lanes of its warp: an operand of wgmma, the address of a row.
  uint32_t exchange[kMostThreads / 32][32][5];
  std::atomic<int> running{0};  // threads that have not ended

  void begin(int threads);
  std::string waiting();
};
inline Cta ctas[kMostCtas];
inline int cluster_size = 1;
inline Meeting cluster_meeting;
inline thread_local int own_rank = 0;

inline Cta& own_cta() {
  return ctas[own_rank];
}
inline int cluster_rank() {
  return own_rank;
}

// Before a CTA's threads begin: shared memory is full of NaN.
inline void Cta::begin(int threads) {
  std::memset(storage, 0xFF, sizeof storage);
  for (auto& unit : unfenced) unit.store(0, std::memory_order_relaxed);
  mbarriers.clear();
  all.reset("__syncthreads", threads);
  both_groups.reset("the barrier of two warpgroups", 256);
  for (Meeting& meeting : warps) meeting.reset("__syncwarp", 32);
  for (Meeting& meeting : groups) meeting.reset("the barrier of a warpgroup", 128);
  running = threads;
}
inline std::string Cta::waiting() {
  std::string text;
  const std::lock_guard<std::mutex> lock(mutex);
  for (const auto& [offset, state] : mbarriers)
    if (state.waiting > 0)
      text += " " + std::to_string(state.waiting) + " threads at mbarrier " + std::to_string(offset - kSharedStart) +
              " (" + std::to_string(state.pending) + " arrivals and " + std::to_string(state.bytes) +
              " bytes are missing),";
  for (const Meeting* meeting : {&all, &both_groups}) text += meeting->waiting();
  for (const Meeting& meeting : warps) text += meeting.waiting();
  for (const Meeting& meeting : groups) text += meeting.waiting();
  return text;
}

inline void fail(const std::string& what) {
  {
    const std::lock_guard<std::mutex> lock(fault_mutex);
    if (!faulty) fault = "CTA " + std::to_string(blockIdx.x) + " thread " + std::to_string(threadIdx.x) + ": " + what;
    faulty = true;
  }
  for (Cta& cta : ctas) {
    const std::lock_guard<std::mutex> lock(cta.mutex);  // so that no thread is between its test and its wait
    cta.changed.notify_all();
  }
  throw Fault{};
}
// The fault of a wait without end says what all threads wait for.
inline void fail_waiting(const std::string& what) {
  std::string text = what + ". Waiting:";
  for (int rank = 0; rank < cluster_size; ++rank)
    text += " CTA " + std::to_string(rank) + " of the cluster:" + ctas[rank].waiting();
  fail(text + cluster_meeting.waiting());
}

// ---- Shared memory

constexpr int kRankShift = 24;
constexpr uint32_t kOffsetMask = (1u << kRankShift) - 1;
inline uint32_t shared_end = 0;  // end of the launch's shared memory
inline thread_local std::vector<uint32_t> own_writes;

inline uint32_t shared_base() {
  return uint32_t(own_rank) << kRankShift | kSharedStart;
}
// The offset of an address in the own CTA's shared memory.
inline uint32_t offset_of(uint32_t address, uint32_t bytes) {
  const uint32_t offset = address & kOffsetMask;
  if (offset < kSharedStart || offset + bytes > shared_end || int(address >> kRankShift) != own_rank)
    fail("address " + std::to_string(address) + " outside of the CTA's shared memory");
  return offset;
}
inline unsigned char* at(uint32_t address, uint32_t bytes) {
  return own_cta().storage + offset_of(address, bytes);
}
inline std::atomic<uint16_t>& unfenced(uint32_t address) {
  return own_cta().unfenced[offset_of(address, 1) / 16];
}
// A write by the calling thread.
inline void write_shared(uint32_t address, const void* value, uint32_t bytes) {
  std::memcpy(at(address, bytes), value, bytes);
  unfenced(address).store(uint16_t(threadIdx.x + 1), std::memory_order_relaxed);
  own_writes.push_back(address);
}
// A read by wgmma or TMA.
inline const unsigned char* read_by_proxy(uint32_t address, uint32_t bytes) {
  const unsigned char* const found = at(address, bytes);
  const int writer = unfenced(address).load(std::memory_order_relaxed);
  if (writer != 0)
    fail("the asynchronous proxy reads what thread " + std::to_string(writer - 1) + " wrote without fence.proxy.async");
  return found;
}
inline void fence_proxy() {
  if (mutation.skip_fence_proxy) return;
  for (const uint32_t address : own_writes) unfenced(address).store(0, std::memory_order_relaxed);
  own_writes.clear();
}

// ---- Barriers of threads

inline void group_barrier(int group) {
  static thread_local int passed = 0;
  const int skipped = mutation.skip_group_barrier;
  if (skipped != 0 && ++passed % 6 == skipped - 1) return;
  own_cta().groups[group].wait();
  // Before a barrier that is left out the first warp is late, so that the others do not find its work done by chance;
  // every other time the others are.
  const bool first_warp = threadIdx.x % 128 < 32, others_late = passed / 6 % 2 == 1;
  if (skipped != 0 && (passed + 1) % 6 == skipped - 1 && first_warp != others_late)
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
}
inline void both_groups_barrier() {
  if (!mutation.skip_both_barrier) own_cta().both_groups.wait();
}
// Stricter than the PTX ISA, whose barrier does not wait for threads that have ended.
inline void cluster_barrier() {
  static thread_local int passed = 0;
  if (++passed != mutation.skip_cluster_barrier) cluster_meeting.wait();
}

// ---- mbarriers, named by their addresses

inline void barrier_init(uint32_t barrier, uint32_t count) {
  constexpr uint32_t kWarpsOfTwo = 16;
  if (mutation.single_count && count == kWarpsOfTwo) count /= 2;
  const uint32_t offset = offset_of(barrier, 8);
  const std::lock_guard<std::mutex> lock(own_cta().mutex);
  Mbarrier& state = own_cta().mbarriers[offset];
  state = {};
  state.count = state.pending = int(count);
}
inline void barrier_init_done() {
  if (mutation.skip_init_fence) return;
  const std::lock_guard<std::mutex> lock(own_cta().mutex);
  for (auto& [offset, state] : own_cta().mbarriers) state.published = int64_t(cluster_meeting.generation());
}
// The state of a barrier of the CTA of number `rank`; with its lock held.
inline Mbarrier& mbarrier_at(std::unique_lock<std::mutex>& lock, int rank, uint32_t offset) {
  const auto found = ctas[rank].mbarriers.find(offset);
  if (found != ctas[rank].mbarriers.end()) return found->second;
  lock.unlock();
  fail("no barrier at address " + std::to_string(offset - kSharedStart) + " of shared memory");
}
// Counts `arrivals` arrivals, and `bytes` more bytes to wait for (negative: bytes that have arrived).
inline void barrier_update(int rank, uint32_t offset, int arrivals, long bytes) {
  Cta& cta = ctas[rank];
  std::unique_lock<std::mutex> lock(cta.mutex);
  Mbarrier& state = mbarrier_at(lock, rank, offset);
  state.pending -= arrivals;
  state.bytes += bytes;
  const bool too_many = state.pending < 0;
  if (state.pending == 0 && state.bytes == 0) {
    state.phase ^= 1;
    state.pending = state.count;
  }
  lock.unlock();
  if (too_many) fail("more arrivals than the barrier's count");
  cta.changed.notify_all();
}
// Checks that the calling thread may use a barrier of the CTA of number `rank`.
inline void check_reach(int rank, uint32_t offset) {
  const std::string name = "CTA " + std::to_string(rank) + " of a cluster of " + std::to_string(cluster_size);
  if (rank < 0 || rank >= cluster_size) fail("there is no " + name);
  if (ctas[rank].running == 0) fail(name + " is used after it has ended");
  if (rank == own_rank) return;
  std::unique_lock<std::mutex> lock(ctas[rank].mutex);
  const auto found = ctas[rank].mbarriers.find(offset);
  const int64_t published = found == ctas[rank].mbarriers.end() ? -1 : found->second.published;
  lock.unlock();
  if (published < 0 || published >= int64_t(cluster_meeting.generation()))
    fail(name + " is used before the barrier of the cluster behind its mbarriers' initialization and fence");
}
inline void barrier_arrive(uint32_t barrier) {
  barrier_update(own_rank, offset_of(barrier, 8), 1, 0);
}
inline void barrier_arrive(uint32_t barrier, int rank) {
  if (rank != own_rank && mutation.skip_remote_arrive) return;
  // Where no barrier follows at the end the second CTA is late, so that the first has ended.
  if (rank < own_rank && mutation.skip_cluster_barrier == 2)
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  const uint32_t offset = offset_of(barrier, 8);
  check_reach(rank, offset);
  barrier_update(rank, offset, 1, 0);
}
inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
  if (mutation.short_expect) bytes -= 128;
  if (mutation.half_expect) bytes /= 2;
  barrier_update(own_rank, offset_of(barrier, 8), 1, long(bytes));
}
inline void wait_phase(uint32_t barrier, uint32_t parity) {
  Cta& cta = own_cta();
  const uint32_t offset = offset_of(barrier, 8);
  std::unique_lock<std::mutex> lock(cta.mutex);
  Mbarrier& state = mbarrier_at(lock, own_rank, offset);
  ++state.waiting;
  const bool done = cta.changed.wait_for(lock, patience(), [&] { return faulty || state.phase != parity; });
  if (faulty) throw Fault{};
  if (done) {
    --state.waiting;
    return;
  }
  lock.unlock();
  fail_waiting("a wait without end for parity " + std::to_string(parity) + " of mbarrier " +
               std::to_string(offset - kSharedStart));
}

}  // namespace lowrank_ops::hopper

inline void __syncthreads() {
  lowrank_ops::hopper::own_cta().all.wait();
}
inline void __syncwarp() {
  lowrank_ops::hopper::own_cta().warps[threadIdx.x / 32].wait();
}
