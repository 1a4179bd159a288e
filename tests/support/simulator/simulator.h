// A simulated GPU that runs one CTA at a time. This is the state that the host versions of the primitives
// (host_primitives.h) work on.
//
// Threads are fibers. A lane runs until it comes to a barrier or a warp-wide instruction (load_matrices, multiply_add);
// then the next lane of its warp runs. When all have arrived, the instruction is carried out once, for all of them. A
// setting fixes, reverses or shuffles the order of the lanes: correct kernels do not depend on it.
//
// The first error ends the launch. Fibers that stopped in the middle are never switched to again: kernels own nothing
// that would have to be released.
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
  kCopyAsync,  // the write to shared memory; the read counts as kLoadGlobal
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

// The place in the source where a kernel calls a primitive.
struct Site {
  const char* file;
  int line;
  bool operator==(const Site&) const = default;
};

// Set before a launch. The members from `skip_barrier` on are mutations: they break the launch, to show that the tests
// would notice.
struct Settings {
  int64_t order = 0;  // of lanes and warps: 0 ascending, 1 descending, 2 shuffled by `seed` for each CTA
  int64_t seed = 0;
  int64_t count = 1;                // whether sectors and bank conflicts are counted; bytes always are
  int64_t shared_limit = 232448;    // bytes of shared memory that a CTA can have; here sm_90's
  int64_t held_ctas = 1;            // CTAs that the GPU holds at a time: those of a persistent kernel
  int64_t skip_barrier = -1;        // nobody waits at the barrier of this id
  int64_t skip_zero_fill = 0;       // copy_async leaves the old bytes where it should write zeros
  int64_t shift_load_matrices = 0;  // load_matrices reads this many bytes further on
  int64_t shift_buffer = -1;        // loads and copies from the global buffer of this index read one element further
  int64_t ignore_waits = 0;         // wait_copies returns at once
};

struct Copy {  // an asynchronous copy under way
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

// The kind of an access of one lane: two lanes with the same kind may be in the same instruction (instructions.h).
struct AccessKind {
  Site site;
  Primitive primitive;
  uint8_t bytes;
  int16_t buffer;  // the buffer's number; -1: shared memory
  bool operator==(const AccessKind&) const = default;
};
struct Access {
  AccessKind what;
  uintptr_t address;
};

struct Warp {
  int index = 0;
  uint32_t bit = 0;       // in Machine::ready
  uint32_t runnable = 0;  // one bit per lane, in the order in which they run
  uint32_t epoch = 0;     // warp barriers since the last CTA barrier
  Fiber* in_order[kLanes] = {};

  // The warp-wide instruction at which lanes are arriving, with its operands and results per lane.
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
  bool traced = false;                // whether any trace has an entry
};

struct Machine {
  Fiber* current = nullptr;
  // The CTA.
  int threads = 0, warps = 0, finished = 0;
  int64_t block = 0, blocks = 0;  // its index, and how many the launch has
  unsigned char* shared = nullptr;
  int64_t shared_bytes = 0;
  uint32_t ready = 0;  // one bit per warp: it has runnable lanes; in the order in which they run
  int arrived = 0;     // threads that wait at the CTA barrier
  int barrier_id = -1;
  Warp* in_order[kMaxWarps] = {};
  // The race detector's state (shared_checker.h).
  uint32_t epoch = 1;
  uint32_t* written = nullptr;  // one state per two bytes of shared memory
  uint32_t* read = nullptr;

  Settings settings;
  std::string error;
  int64_t ctas = 0, launches = 0, largest_shared = 0;
  int64_t barriers[64] = {};  // per barrier: how often a CTA or a warp passed it
  int64_t instructions[int(Primitive::kCount)] = {};

  void (*body)(const void*) = nullptr;
  const void* argument = nullptr;
  Context host;
  Warp warp[kMaxWarps];
  Fiber fiber[kMaxThreads];
};
extern Machine machine;

// Ends the launch with an error message, to which it adds block, thread and place.
[[noreturn, gnu::format(printf, 2, 3)]] void fail(Site site, const char* format, ...);

// Runs `body(argument)` in every thread of every CTA. False: there was an error, which machine.error describes.
bool run(int64_t ctas, int threads, int64_t shared_bytes, void (*body)(const void*), const void* argument);

// A warp-wide instruction. The calling lane has put its operands into its Warp; returns when all lanes have done so and
// the results are there.
void collective(Primitive kind, int barrier_id, Site site);
void cta_barrier(int id, Site site);

// The arithmetic of the warp-wide instructions (matrices.cpp).
void multiply(Warp& warp, Primitive kind);
void load_matrices(Warp& warp);

}  // namespace lowrank_ops::simulator
