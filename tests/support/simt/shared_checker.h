// Shared memory: bounds, alignment, reads of bytes that nobody wrote, and races, found by happens-before.
//
// A state of 32 bits for each two bytes (threads may write neighbouring 16-bit elements of a word) and kind of access
// says who accessed them last and when:
//   epoch of the CTA (12 bits: barriers passed) | epoch of the warp (9: warp barriers since) | who (11)
// where `who` is a thread, several lanes of one warp, or threads of several warps. Accesses of different CTA epochs are
// ordered by the barrier between; in one epoch, those of one thread by its program, those of one warp by a warp barrier
// between, and no others. That is exact: two accesses that nothing orders are reported whatever order they ran in.
//
// load_matrices reads as "several lanes": its rows go to other lanes than those that name them. Like multiply_add it
// orders nothing.
//
// copy_async marks its bytes pending until the thread's wait_copies retires them: any access before that, by anybody,
// is an error, and the data arrive only then. Retired, they count as written by the thread at that moment, so that
// other threads need a barrier after its wait.
#pragma once

#include <cstdint>
#include <cstring>

#include "simulator.h"

namespace lowrank_ops::simulator {

constexpr int kEpochShift = 20, kWarpShift = 11;
constexpr uint32_t kMaxEpoch = 0xffe, kMaxWarpEpoch = 0x1ff;
constexpr uint32_t kNever = 0xffffffff;               // written: not in this CTA
constexpr uint32_t kPending = 0xfffu << kEpochShift;  // written: under way, | thread
constexpr uint32_t kLanesOf = 1024;                   // who: several lanes of a warp, + its index
constexpr uint32_t kWhoMask = 2047;
constexpr uint32_t kSeveralWarps = (1u << kEpochShift) - 1;  // warp epoch and who, all ones

void allocate_shared(int64_t bytes);
void release_shared();
void begin_shared();  // of a CTA: poison, nothing written
void next_epoch();

inline uint32_t epoch_base() {
  return machine.epoch << kEpochShift;
}
inline uint32_t state_of(const Fiber& fiber) {
  return epoch_base() | fiber.warp->epoch << kWarpShift | uint32_t(fiber.thread);
}
inline uint32_t state_of(const Warp& warp) {
  return epoch_base() | warp.epoch << kWarpShift | kLanesOf | uint32_t(warp.index);
}

// The offset of an access that lies inside and is aligned to its size.
inline int64_t shared_offset(const void* address, int bytes, Primitive primitive, Site site) {
  const int64_t offset = static_cast<const unsigned char*>(address) - machine.shared;
  if (offset < 0 || offset + bytes > machine.shared_bytes) [[unlikely]]
    fail(site, "%s of %d bytes at offset %lld: shared memory has %lld bytes", name_of(primitive), bytes,
         static_cast<long long>(offset), static_cast<long long>(machine.shared_bytes));
  if (offset & (bytes - 1)) [[unlikely]]
    fail(site, "%s of %d bytes at offset %lld of shared memory: not aligned", name_of(primitive), bytes,
         static_cast<long long>(offset));
  return offset;
}

// Two bytes at a time, where something happened in this epoch: sets the state, or reports.
void examine_read(int64_t granule, uint32_t state, Primitive primitive, Site site);
void examine_write(int64_t granule, uint32_t state, uint32_t mark, Primitive primitive, Site site);

template <int granules>
struct States {
  typedef uint32_t Vector __attribute__((vector_size(4 * granules)));

  static Vector load(const uint32_t* from) {
    Vector value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
  static void store(uint32_t* to, Vector value) { std::memcpy(to, &value, sizeof value); }
  template <typename Mask>
  static bool any(Mask mask) {
    if constexpr (granules == 1) {
      return mask[0] != 0;
    } else {
      uint64_t word[granules / 2], found = 0;
      std::memcpy(word, &mask, sizeof mask);
      for (int i = 0; i < granules / 2; i++) found |= word[i];
      return found != 0;
    }
  }
};

// All granules of an access at once: where nothing of this epoch collides, which is nearly always.
template <int bytes>
inline void check_read(int64_t offset, uint32_t state, Primitive primitive, Site site) {
  constexpr int granules = bytes < 2 ? 1 : bytes / 2;
  using S = States<granules>;
  uint32_t* const read = machine.read + offset / 2;
  const uint32_t base = epoch_base(), several = base | kSeveralWarps;
  const auto w = S::load(machine.written + offset / 2), r = S::load(read);
  const auto before = r == several;
  if (S::any(((w >= base) & (w != state)) | ((r >= base) & (r != state) & ~before))) [[unlikely]] {
    for (int i = 0; i < granules; i++) examine_read(offset / 2 + i, state, primitive, site);
  } else {
    S::store(read, (r & typename S::Vector(before)) | (state & ~typename S::Vector(before)));
  }
}

// `mark`: what the bytes are from now on: the state, or pending.
template <int bytes>
inline void check_write(int64_t offset, uint32_t state, uint32_t mark, Primitive primitive, Site site) {
  constexpr int granules = bytes < 2 ? 1 : bytes / 2;
  using S = States<granules>;
  uint32_t* const written = machine.written + offset / 2;
  const uint32_t base = epoch_base();
  const auto w = S::load(written), r = S::load(machine.read + offset / 2);
  if (S::any(((w >= base) & (w != state) & (w != kNever)) | ((r >= base) & (r != state)))) [[unlikely]] {
    for (int i = 0; i < granules; i++) examine_write(offset / 2 + i, state, mark, primitive, site);
  } else {
    S::store(written, typename S::Vector{} + mark);
  }
}

// Asynchronous copies of the calling thread.
void begin_copy(void* shared, const void* global, int bytes, bool valid, Site site);
void wait_for_copies(int pending);

}  // namespace lowrank_ops::simulator
