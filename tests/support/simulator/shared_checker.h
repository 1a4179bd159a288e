// Checks of shared memory: bounds, alignment, reads of bytes that nothing wrote, and races (two accesses that no
// barrier orders).
//
// Every two bytes have two states of 32 bits, one for reads and one for writes, that say who accessed them last and
// when (two bytes, because threads may write neighbouring 16-bit elements of a word):
//   epoch of the CTA (12 bits: barriers passed) | epoch of the warp (9: warp barriers since) | who (11)
// where `who` is a thread, several lanes of one warp, or threads of several warps. Accesses of different CTA epochs are
// ordered by the barrier between them. Within an epoch, accesses of one thread are ordered by its program, and those of
// one warp by a warp barrier between them; no others are. The check is exact: two accesses that nothing orders are
// reported, whatever the order in which they ran.
//
// load_matrices reads as "several lanes": a row goes to other lanes than the one that gives its address. Like
// multiply_add it orders nothing.
//
// copy_async marks its bytes as pending. The thread's wait_copies retires them: only then the data arrive, and any
// access by any thread before that is an error. From then on they count as written by the thread, so that other threads
// need a barrier after its wait.
#pragma once

#include <cstdint>
#include <cstring>

#include "simulator.h"

namespace lowrank_ops::simulator {

constexpr int kEpochShift = 20, kWarpShift = 11;
constexpr uint32_t kMaxEpoch = 0xffe, kMaxWarpEpoch = 0x1ff;
constexpr uint32_t kNever = 0xffffffff;               // state of writes: not written in this CTA
constexpr uint32_t kPending = 0xfffu << kEpochShift;  // state of writes: under way; or-ed with the thread
constexpr uint32_t kLanesOf = 1024;                   // `who` for several lanes of a warp, plus the warp's index
constexpr uint32_t kWhoMask = 2047;
constexpr uint32_t kSeveralWarps = (1u << kEpochShift) - 1;  // threads of several warps: warp epoch and `who`, all ones

void allocate_shared(int64_t bytes);
void release_shared();
void begin_shared();  // at the beginning of a CTA: fills memory with NaN, and nothing counts as written
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

// The offset of an access. Fails if it does not lie inside of shared memory or is not aligned to its size.
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

// The slow check, of two bytes that were accessed in this epoch: sets the new state, or reports an error.
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

// The fast check of all granules (two bytes each) of an access at once. It suffices where no earlier access of this
// epoch may collide, which is nearly always.
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

// `mark`: the bytes' new state of writes, which is `state` or pending.
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

// The calling thread's asynchronous copies.
void begin_copy(void* shared, const void* global, int bytes, bool valid, Site site);
void wait_for_copies(int pending);

}  // namespace lowrank_ops::simulator
