// A GPU of one CTA at a time: what the host versions of the primitives (host_primitives.h) share.
//
// Threads are fibers. A lane runs until it meets a barrier or a warp-wide instruction (load_matrices, multiply_add);
// then the next lane of its warp runs; when all have arrived, the instruction is carried out once, for all of them.
// The order of the lanes is fixed, reversed or shuffled by a setting: right kernels do not depend on it.
//
// The first error ends the launch. A fiber that stops in the middle is simply never switched to again: kernels own
// nothing that would have to be released.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "fibers.h"

namespace lowrank_ops::simulator {

constexpr int kLanes = 32, kMaxThreads = 1024, kMaxWarps = kMaxThreads / kLanes;

enum class Primitive : uint8_t {
  kLoadShared,
  kStoreShared,
  kLoadMatrices,
  kCopyAsync,  // its shared side; its global side counts as kLoadGlobal
  kLoadGlobal,
  kStoreGlobal,
  kMultiplyBFloat16,
  kMultiplyHalf,
  kMultiplyTf32,
  kWarpBarrier,
  kBarrier,
  kCommitCopies,
  kCount
};
const char* name_of(Primitive primitive);

// A call of a primitive in a kernel.
struct Site {
  const char* file;
  int line;
  bool operator==(const Site&) const = default;
};

// Set before a launch. The switches below `order` are mutations: what a test does to see whether it would notice.
struct Settings {
  int64_t order = 0;  // of the lanes and warps: 0 ascending, 1 descending, 2 shuffled by `seed` for each CTA
  int64_t seed = 0;
  int64_t count = 1;                // sectors and bank conflicts; bytes are always counted
  int64_t shared_limit = 232448;    // bytes of shared memory that a CTA can have: sm_90's
  int64_t skip_barrier = -1;        // nobody waits at the barrier of this id
  int64_t skip_zero_fill = 0;       // copy_async leaves the old bytes where it should write zeros
  int64_t shift_load_matrices = 0;  // load_matrices reads this many bytes further (inside shared memory)
  int64_t shift_buffer = -1;        // loads and copies from the global buffer of this index read one element further
  int64_t ignore_waits = 0;         // wait_copies returns at once
};

struct Copy {  // an asynchronous one under way
  unsigned char* to;
  const unsigned char* from;
  int bytes;
  bool valid;
  int group;
};

struct Warp;

struct Fiber {
  Context context;
  Warp* warp = nullptr;
  int thread = 0, lane = 0;
  uint32_t bit = 0;  // in Warp::runnable
  bool finished = false;
  Primitive waits_in = Primitive::kCount;
  Site waits_at{};
  std::vector<Copy> copies;  // issued and not yet waited for: from `first_copy` on
  size_t first_copy = 0;
  int committed = 0, retired = 0;  // groups of copies
};

// An access of one lane (instructions.h).
struct What {
  Site site;
  Primitive primitive;
  uint8_t bytes;
  int16_t buffer;  // of global memory
  bool operator==(const What&) const = default;
};
struct Access {
  What what;
  uintptr_t address;
};

struct Warp {
  int index = 0;
  uint32_t bit = 0;       // in Machine::ready
  uint32_t runnable = 0;  // a bit a lane, in the order in which they run
  uint32_t epoch = 0;     // warp barriers since the last CTA barrier
  Fiber* in_order[kLanes] = {};

  // The warp-wide instruction that lanes are arriving at, and its operands and results, lane by lane.
  int arrived = 0;
  Primitive kind = Primitive::kCount;
  int barrier_id = -1;
  Site site{};
  alignas(64) uint32_t a[4][kLanes];
  alignas(64) uint32_t b[2][kLanes];
  alignas(64) float sum[2][kLanes][2];
  alignas(64) uint32_t matrices[4][kLanes];
  const void* row[kLanes];

  std::vector<Access> trace[kLanes];  // since the lanes last met
  bool traced = false;                // whether there is anything in it
};

struct Machine {
  Fiber* current = nullptr;
  // The CTA.
  int threads = 0, warps = 0, finished = 0;
  int64_t block = 0;
  unsigned char* shared = nullptr;
  int64_t shared_bytes = 0;
  uint32_t ready = 0;  // a bit a warp that has runnable lanes, in the order in which they run
  int arrived = 0;     // at the CTA barrier
  int barrier_id = -1;
  Warp* in_order[kMaxWarps] = {};
  // The race detector's state (shared_checker.h).
  uint32_t epoch = 1;
  uint32_t* written = nullptr;  // for each two bytes of shared memory
  uint32_t* read = nullptr;

  Settings settings;
  std::string error;
  int64_t ctas = 0, launches = 0, largest_shared = 0;
  int64_t barriers[64] = {};  // times that a CTA or warp passed each
  int64_t instructions[int(Primitive::kCount)] = {};

  void (*body)(const void*) = nullptr;
  const void* argument = nullptr;
  Context host;
  Warp warp[kMaxWarps];
  Fiber fiber[kMaxThreads];
};
extern Machine machine;

// Ends the launch with a message that names the block and the thread.
[[noreturn, gnu::format(printf, 2, 3)]] void fail(Site site, const char* format, ...);

// Runs `body(argument)` in every thread of every CTA. False: an error, in machine.error.
bool run(int64_t ctas, int threads, int64_t shared_bytes, void (*body)(const void*), const void* argument);

// The calling lane has put its operands into its warp; returns when all lanes have and the results are there.
void collective(Primitive kind, int barrier_id, Site site);
void cta_barrier(int id, Site site);

// The arithmetic of the warp-wide instructions (matrices.cpp).
void multiply(Warp& warp, Primitive kind);
void load_matrices(Warp& warp);

}  // namespace lowrank_ops::simulator
