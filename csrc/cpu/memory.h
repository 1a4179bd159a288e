// Scratch memory of the CPU kernels. Each thread keeps freed memory for its next call, because getting fresh pages
// takes longer than computing most blocks' values in them. It keeps kMostKeptBytes (plan/cpu/planner.h) at most, until
// it ends or release_memory() is called.
#pragma once

#include <cstdint>
#include <memory>

#include "plan/cpu/planner.h"

namespace lowrank_ops {

constexpr int64_t kLeastKeptBytes = 64 << 10;  // smaller blocks go back to malloc, which keeps them itself

// Memory aligned to 64 bytes.
struct GiveBack {
  int64_t bytes = 0;
  void operator()(char* memory) const;
};
using AlignedMemory = std::unique_ptr<char, GiveBack>;
AlignedMemory allocate(int64_t bytes);

// Bytes that the threads of this process keep at the moment; memory of running calls does not count.
int64_t kept_memory();
// Frees that memory and returns its bytes. Safe while ops run in other threads.
int64_t release_memory();

// One allocation for all tiles of a thread.
class Scratch {
 public:
  explicit Scratch(int64_t bytes);
  // The next `bytes` of the allocation, aligned to 64.
  void* take(int64_t bytes);
  static int64_t padded(int64_t bytes) { return round_up(bytes, int64_t(64)); }

 private:
  AlignedMemory memory_;
  char* next_;
  char* end_;
};

}  // namespace lowrank_ops
