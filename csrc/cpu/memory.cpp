#include "cpu/memory.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <utility>
#include <vector>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace lowrank_ops {
namespace {

struct Block {
  char* memory;
  int64_t bytes;
};

// The freed blocks of one thread, oldest first. Only release_memory() and kept_memory(), which other threads may call,
// ever make the thread wait for the mutex.
class Kept {
 public:
  Kept();
  ~Kept();

  // The smallest block of at least `wanted` and at most twice as many bytes; nullptr: there is none.
  char* take(int64_t wanted, int64_t& found) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = blocks_.end();
    for (auto block = blocks_.begin(); block != blocks_.end(); ++block)
      if (block->bytes >= wanted && block->bytes <= 2 * wanted && (best == blocks_.end() || block->bytes < best->bytes))
        best = block;
    if (best == blocks_.end()) return nullptr;
    char* memory = best->memory;
    found = best->bytes;
    bytes_ -= found;
    blocks_.erase(best);
    return memory;
  }

  void give(char* memory, int64_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    while (!blocks_.empty() && bytes_ + size > kMostKeptBytes) {
      bytes_ -= blocks_.front().bytes;
      std::free(blocks_.front().memory);
      blocks_.erase(blocks_.begin());
    }
    blocks_.push_back({memory, size});
    bytes_ += size;
  }

  int64_t bytes() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return bytes_;
  }

  int64_t release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const Block& block : blocks_) std::free(block.memory);
    blocks_.clear();
    return std::exchange(bytes_, 0);
  }

 private:
  mutable std::mutex mutex_;
  std::vector<Block> blocks_;
  int64_t bytes_ = 0;
};

// The Kept of all living threads.
struct Threads {
  std::mutex mutex;
  std::vector<Kept*> kept;
};
Threads& threads() {
  static Threads* instance = new Threads;  // never destroyed: threads may end after static objects have
  return *instance;
}

thread_local bool ended = false;  // this thread's Kept is gone, but another thread_local object still frees memory
thread_local Kept kept;

Kept::Kept() {
  const std::lock_guard<std::mutex> lock(threads().mutex);
  threads().kept.push_back(this);
}

Kept::~Kept() {
  const std::lock_guard<std::mutex> lock(threads().mutex);
  std::vector<Kept*>& all = threads().kept;
  all.erase(std::find(all.begin(), all.end(), this));
  release();
  ended = true;
}

}  // namespace

AlignedMemory allocate(int64_t bytes) {
  int64_t size = round_up(std::max<int64_t>(bytes, 64), int64_t(64));
  char* memory = size >= kLeastKeptBytes && !ended ? kept.take(size, size) : nullptr;
  if (!memory) memory = static_cast<char*>(std::aligned_alloc(64, size_t(size)));
  TORCH_CHECK_WITH(OutOfMemoryError, memory, "lowrank_ops: could not allocate ", bytes, " bytes of scratch memory");
  return AlignedMemory(memory, {size});
}

void GiveBack::operator()(char* memory) const {
  if (bytes < kLeastKeptBytes || bytes > kMostKeptBytes || ended)
    std::free(memory);
  else
    kept.give(memory, bytes);
}

int64_t kept_memory() {
  const std::lock_guard<std::mutex> lock(threads().mutex);
  int64_t bytes = 0;
  for (const Kept* one : threads().kept) bytes += one->bytes();
  return bytes;
}

int64_t release_memory() {
  int64_t bytes = 0;
  {
    const std::lock_guard<std::mutex> lock(threads().mutex);
    for (Kept* one : threads().kept) bytes += one->release();
  }
#if defined(__GLIBC__)
  malloc_trim(0);  // free() alone keeps what lies inside the heap
#endif
  return bytes;
}

Scratch::Scratch(int64_t bytes)
    : memory_(allocate(bytes)), next_(memory_.get()), end_(next_ + memory_.get_deleter().bytes) {}

void* Scratch::take(int64_t bytes) {
  char* result = next_;
  next_ += padded(bytes);
  TORCH_INTERNAL_ASSERT(next_ <= end_, "lowrank_ops: scratch memory was counted too small");
  return result;
}

}  // namespace lowrank_ops
