#include "shared_checker.h"

#include <algorithm>
#include <cstdlib>
#include <string>

#include "counters.h"

namespace lowrank_ops::simulator {
namespace {

constexpr size_t kAlignment = 1024;  // kernels may rely on 128 bytes, swizzled layouts need 1024
int64_t granules = 0;

std::string describe(uint32_t state) {
  const uint32_t who = state & kWhoMask;
  if ((state & kSeveralWarps) == kSeveralWarps) return "threads of several warps";
  if (who >= kLanesOf) return "lanes of warp " + std::to_string(who - kLanesOf);
  return "thread " + std::to_string(who);
}

// Whether barriers or the program order put the access `earlier` before the one by `state`.
bool ordered(uint32_t earlier, uint32_t state) {
  if (earlier < epoch_base()) return true;
  if ((earlier & kSeveralWarps) == kSeveralWarps) return false;
  const uint32_t who = earlier & kWhoMask, now = state & kWhoMask;
  if (who == now && now < kLanesOf) return true;
  const uint32_t warp = who >= kLanesOf ? who - kLanesOf : who / kLanes;
  const uint32_t own = now >= kLanesOf ? now - kLanesOf : now / kLanes;
  return warp == own && (earlier >> kWarpShift & kMaxWarpEpoch) < (state >> kWarpShift & kMaxWarpEpoch);
}

[[noreturn]] void race(int64_t granule, uint32_t earlier, const char* did, Primitive primitive, Site site) {
  fail(site, "race at byte %lld of shared memory: %s, which %s %s with no barrier between",
       static_cast<long long>(2 * granule), name_of(primitive), describe(earlier).c_str(), did);
}

void check_written(int64_t granule, uint32_t written, uint32_t state, Primitive primitive, Site site) {
  if (written >= kPending)
    fail(site, "%s at byte %lld of shared memory: an asynchronous copy by thread %u is under way, not waited for",
         name_of(primitive), static_cast<long long>(2 * granule), written & kWhoMask);
  if (!ordered(written, state)) race(granule, written, "wrote", primitive, site);
}

}  // namespace

void examine_read(int64_t granule, uint32_t state, Primitive primitive, Site site) {
  const uint32_t written = machine.written[granule];
  if (written == kNever)
    fail(site, "uninitialized read: %s at byte %lld of shared memory, which nothing wrote", name_of(primitive),
         static_cast<long long>(2 * granule));
  check_written(granule, written, state, primitive, site);
  // Reads need no order among themselves. An earlier read that is ordered before this one can be forgotten: whatever is
  // ordered after this read is ordered after that one, too.
  uint32_t& read = machine.read[granule];
  if (read < epoch_base() || (read & kWhoMask) == (state & kWhoMask)) {
    read = state;
  } else if ((read & kSeveralWarps) != kSeveralWarps) {
    const uint32_t who = read & kWhoMask, now = state & kWhoMask;
    const uint32_t warp = who >= kLanesOf ? who - kLanesOf : who / kLanes;
    const uint32_t own = now >= kLanesOf ? now - kLanesOf : now / kLanes;
    if (warp != own)
      read = epoch_base() | kSeveralWarps;
    else if ((read >> kWarpShift & kMaxWarpEpoch) < (state >> kWarpShift & kMaxWarpEpoch))
      read = state;
    else
      read = (state & ~kWhoMask) | kLanesOf | own;
  }
}

void examine_write(int64_t granule, uint32_t state, uint32_t mark, Primitive primitive, Site site) {
  const uint32_t written = machine.written[granule];
  if (written != kNever) check_written(granule, written, state, primitive, site);
  if (!ordered(machine.read[granule], state)) race(granule, machine.read[granule], "read", primitive, site);
  machine.written[granule] = mark;
}

void allocate_shared(int64_t bytes) {
  granules = (bytes + 1) / 2;
  // Exactly as long as the launch says, so that AddressSanitizer sees accesses that pass these checks by mistake.
  void* memory = nullptr;
  if (posix_memalign(&memory, kAlignment, size_t(std::max<int64_t>(bytes, 1))) != 0) std::abort();
  machine.shared = static_cast<unsigned char*>(memory);
  machine.shared_bytes = bytes;
  machine.written = new uint32_t[granules];
  machine.read = new uint32_t[granules]();
  machine.epoch = 1;
}

void release_shared() {
  std::free(machine.shared);
  delete[] machine.written;
  delete[] machine.read;
  machine.shared = nullptr;
}

void begin_shared() {
  std::memset(machine.shared, 0xff, size_t(machine.shared_bytes));  // NaN in every type
  std::fill(machine.written, machine.written + granules, kNever);
  next_epoch();  // the reads of the last CTA belong to an earlier epoch now
}

void next_epoch() {
  if (++machine.epoch < kMaxEpoch) return;
  // All accesses before a barrier are ordered, so the epochs can be counted from 1 again.
  machine.epoch = 1;
  std::fill(machine.read, machine.read + granules, 0);
  for (int64_t i = 0; i < granules; i++)
    if (machine.written[i] < kPending) machine.written[i] = 0;
}

void begin_copy(void* shared, const void* global, int bytes, bool valid, Site site) {
  Fiber& fiber = *machine.current;
  const int64_t offset = shared_offset(shared, bytes, Primitive::kCopyAsync, site);
  if (valid) global = read_global(global, bytes, Primitive::kCopyAsync, site);
  const uint32_t state = state_of(fiber), mark = kPending | uint32_t(fiber.thread);
  if (bytes == 16)
    check_write<16>(offset, state, mark, Primitive::kCopyAsync, site);
  else if (bytes == 8)
    check_write<8>(offset, state, mark, Primitive::kCopyAsync, site);
  else
    check_write<4>(offset, state, mark, Primitive::kCopyAsync, site);
  record(fiber, Primitive::kCopyAsync, bytes, -1, uintptr_t(offset), site);
  fiber.copies.push_back(
      {machine.shared + offset, static_cast<const unsigned char*>(global), bytes, valid, fiber.committed});
}

void wait_for_copies(int pending) {
  Fiber& fiber = *machine.current;
  if (machine.settings.ignore_waits) return;
  const uint32_t state = state_of(fiber);
  for (; fiber.committed - fiber.retired > pending; fiber.retired++) {
    for (; fiber.first_copy < fiber.copies.size(); fiber.first_copy++) {
      const Copy& copy = fiber.copies[fiber.first_copy];
      if (copy.group != fiber.retired) break;
      if (copy.valid)
        std::memcpy(copy.to, copy.from, size_t(copy.bytes));
      else if (!machine.settings.skip_zero_fill)
        std::memset(copy.to, 0, size_t(copy.bytes));
      uint32_t* const written = machine.written + (copy.to - machine.shared) / 2;
      std::fill(written, written + copy.bytes / 2, state);
    }
  }
  if (fiber.first_copy == fiber.copies.size()) {
    fiber.copies.clear();
    fiber.first_copy = 0;
  }
}

}  // namespace lowrank_ops::simulator
