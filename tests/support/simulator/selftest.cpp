// Kernels for the simulator's own tests (test_harness.py): access patterns of known cost, and mistakes that the
// simulator must see.
#include <string>

#include "primitive_kernels.cuh"

namespace lowrank_ops {
namespace {

using Params = PrimitiveParams;

unsigned char* word_of(int64_t index) {
  return shared_memory() + index * 4;
}

// Writes a word, waits, reads another thread's word. argument: 0 how it waits (0 not at all, 1 warp barrier, 2 CTA
// barrier), 1 how far away the other thread is (in the same warp, modulo 32), 2 whether it is in another warp instead,
// 3 whether it reads before it writes.
void exchange(const Params p) {
  const int thread = thread_index();
  const auto wait = [&] {
    if (p.argument[0] == 1) warp_barrier<Barrier::kStagingWritten>();
    if (p.argument[0] == 2) barrier<Barrier::kChunk>();
  };
  const int64_t distance = p.argument[1];
  const int64_t other = p.argument[2] ? (thread + 32) % 64 : thread / 32 * 32 + (thread + distance) % 32;
  store_shared(word_of(thread), uint32_t(thread));
  barrier<Barrier::kTables>();
  if (p.argument[3]) {
    const uint32_t got = load_shared<uint32_t>(word_of(other));
    wait();
    store_shared(word_of(thread), got);
    put_word(p.out, thread, got);
  } else {
    store_shared(word_of(thread), uint32_t(thread));
    wait();
    put_word(p.out, thread, load_shared<uint32_t>(word_of(other)));
  }
}

// Neighbouring threads write the two halves of a word, and each reads its own half back. argument 0: elements of 2
// bytes between threads.
void halves(const Params p) {
  unsigned char* const own = shared_memory() + thread_index() * 2 * p.argument[0];
  store_shared(own, uint16_t(thread_index()));
  put_word(p.out, thread_index(), load_shared<uint16_t>(own));
}

// In each epoch all threads read word 0, and one thread writes it after a barrier. argument: 0 number of epochs, 1
// whether the last barrier is left out.
void many_epochs(const Params p) {
  if (thread_index() == 0) store_shared(word_of(0), uint32_t(0));
  barrier<Barrier::kTables>();
  for (int64_t i = 0; i < p.argument[0]; i++) {
    const uint32_t value = load_shared<uint32_t>(word_of(0));
    if (i + 1 < p.argument[0] || !p.argument[1]) barrier<Barrier::kChunk>();
    if (thread_index() == i % 64) store_shared(word_of(0), value + 1);
    barrier<Barrier::kHiddenRead>();
  }
  put_word(p.out, thread_index(), load_shared<uint32_t>(word_of(0)));
}

// argument 0: 0 load_shared, 1 load_matrices of rows whose last 8 bytes nobody wrote, 2 half of a word.
void uninitialized(const Params p) {
  const int thread = thread_index();
  if (p.argument[0] == 0) put_word(p.out, thread, load_shared<uint32_t>(word_of(thread)));
  if (p.argument[0] == 1) {
    store_shared(shared_memory() + 16 * thread, uint64_t(0));
    warp_barrier<Barrier::kStagingWritten>();
    uint32_t matrices[4];
    load_matrices(matrices, shared_memory() + 16 * thread);
  }
  if (p.argument[0] == 2) {
    store_shared(word_of(thread), uint16_t(1));
    put_word(p.out, thread, load_shared<uint32_t>(word_of(thread)));
  }
}

// Mistakes with asynchronous copies, selected by argument 0; 0 makes none. 64 threads.
void copies(const Params p) {
  const int thread = thread_index(), other = (thread + 32) % 64;
  const int64_t mistake = p.argument[0];
  const uint32_t* const in = static_cast<const uint32_t*>(p.in);
  const auto copy = [&](int place) { copy_async<4>(word_of(place), in + place, true); };
  store_shared(word_of(thread), uint32_t(0));
  store_shared(word_of(64 + thread), uint32_t(0));
  barrier<Barrier::kTables>();
  if (mistake == 1) {  // read before the wait, by the thread itself
    copy(thread);
    commit_copies();
    put_word(p.out, thread, load_shared<uint32_t>(word_of(thread)));
  } else if (mistake == 2) {  // waited for, but no barrier before another thread reads
    copy(thread);
    commit_copies();
    wait_copies<0>();
    put_word(p.out, thread, load_shared<uint32_t>(word_of(other)));
  } else if (mistake == 3) {  // the barrier before the wait
    copy(thread);
    commit_copies();
    barrier<Barrier::kChunk>();
    wait_copies<0>();
    put_word(p.out, thread, load_shared<uint32_t>(word_of(other)));
  } else if (mistake == 4) {  // no wait at all
    copy(thread);
    commit_copies();
  } else if (mistake == 5) {  // the second of two groups is under way still
    copy(thread);
    commit_copies();
    copy(64 + thread);
    commit_copies();
    wait_copies<1>();
    put_word(p.out, thread, load_shared<uint32_t>(word_of(64 + thread)));
  } else if (mistake == 6) {  // copied over what another thread reads in the same epoch
    put_word(p.out, thread, load_shared<uint32_t>(word_of(other)));
    copy(thread);
    commit_copies();
    wait_copies<0>();
  } else if (mistake == 7) {  // not committed: the wait does not cover it
    copy(thread);
    wait_copies<0>();
    put_word(p.out, thread, load_shared<uint32_t>(word_of(thread)));
  } else if (mistake == 8) {  // two copies to one place
    copy(0);
    commit_copies();
    wait_copies<0>();
  } else {
    copy(thread);
    commit_copies();
    wait_copies<0>();
    barrier<Barrier::kChunk>();
    put_word(p.out, thread, load_shared<uint32_t>(word_of(other)));
  }
}

// Threads that never meet, in ways selected by argument 0.
void deadlock(const Params p) {
  const int thread = thread_index();
  uint32_t matrices[4];
  if (p.argument[0] == 0 && thread < 32) barrier<Barrier::kChunk>();                     // one warp ends instead
  if (p.argument[0] == 1 && thread != 5) barrier<Barrier::kChunk>();                     // one thread ends instead
  if (p.argument[0] == 2 && thread % 32 < 16) load_matrices(matrices, shared_memory());  // half a warp
  if (p.argument[0] == 3) {  // lanes of a warp in different instructions
    if (thread % 2)
      load_matrices(matrices, shared_memory());
    else
      warp_barrier<Barrier::kStagingRead>();
  }
  if (p.argument[0] == 4) {  // barriers of different names
    if (thread < 32)
      barrier<Barrier::kChunk>();
    else
      barrier<Barrier::kTables>();
  }
  if (p.argument[0] == 5) {  // one warp waits for the CTA, a lane of the other for its warp
    if (thread == 40)
      warp_barrier<Barrier::kStagingRead>();
    else
      barrier<Barrier::kChunk>();
  }
}

// Accesses out of bounds or not aligned, selected by argument 0.
void outside(const Params p) {
  const unsigned char* const in = static_cast<const unsigned char*>(p.in);
  unsigned char* const shared = shared_memory();
  const int64_t bytes = p.argument[1];  // of shared memory and of `in`
  if (p.argument[0] == 0) store_shared(shared + bytes, uint32_t(0));
  if (p.argument[0] == 1) store_shared(shared - 4, uint32_t(0));
  if (p.argument[0] == 2) store_shared(shared + 2, uint32_t(0));
  if (p.argument[0] == 3) put_word(p.out, 0, load_global<uint32_t>(in + bytes));
  if (p.argument[0] == 4) put_word(p.out, 0, load_global<uint32_t>(in + 2));
  if (p.argument[0] == 5) store_global(static_cast<unsigned char*>(p.out) - 4, uint32_t(0));
  if (p.argument[0] == 6) copy_async<16>(shared, in + 8, true);
  if (p.argument[0] == 7) copy_async<16>(shared + 8, in, true);
  if (p.argument[0] == 8) copy_async<16>(shared, in + bytes - 8, true);
  if (p.argument[0] == 9) {  // not valid: no byte is read, so the address does not matter
    copy_async<16>(shared + 16 * thread_index(), in + bytes + 4, false);
    commit_copies();
    wait_copies<0>();
    put_word(p.out, thread_index(), load_shared<uint32_t>(shared + 16 * thread_index()));
  }
}

// Every lane accesses one place, `stride` bytes behind the place of the lane before. argument: 0 bytes per access, 1
// stride, 2 the first lane's offset, 3 lanes that take part.
template <typename Value>
void strided(const Params& p, bool global) {
  const int lane = thread_index();
  const int64_t offset = p.argument[2] + lane * p.argument[1];
  if (global) {
    if (lane < p.argument[3]) {
      const Value value = load_global<Value>(static_cast<const unsigned char*>(p.in) + offset);
      store_global(static_cast<unsigned char*>(p.out) + offset, value);
    }
  } else {
    if (lane == 0)
      for (int64_t i = 0; i < p.argument[2] + 32 * p.argument[1] + 16; i += 4) store_shared(shared_memory() + i, 0);
    barrier<Barrier::kTables>();
    if (lane < p.argument[3]) (void)load_shared<Value>(shared_memory() + offset);
    barrier<Barrier::kChunk>();
    if (lane < p.argument[3] && p.argument[1] >= int64_t(sizeof(Value)))
      store_shared(shared_memory() + offset, Value{});
  }
}
template <bool global>
void strided_by_size(const Params p) {
  if (p.argument[0] == 2) strided<uint16_t>(p, global);
  if (p.argument[0] == 4) strided<uint32_t>(p, global);
  if (p.argument[0] == 8) strided<uint64_t>(p, global);
  if (p.argument[0] == 16) strided<Words<4>>(p, global);
}

// load_matrices of rows argument[0] bytes apart.
void matrix_rows(const Params p) {
  const int lane = thread_index();
  if (lane == 0)
    for (int64_t i = 0; i < 32 * p.argument[0] + 16; i += 4) store_shared(shared_memory() + i, 0);
  warp_barrier<Barrier::kStagingWritten>();
  uint32_t matrices[4];
  load_matrices(matrices, shared_memory() + lane * p.argument[0]);
}

// Lanes take different paths before they meet: lane i loads i words; afterwards all lanes store one word.
void divergent(const Params p) {
  const int lane = thread_index();
  uint32_t sum = 0;
  for (int i = 0; i < lane; i++) sum += word_at(p.in, i);
  put_word(p.out, lane, sum);
  warp_barrier<Barrier::kStagingWritten>();
}

// A loop in which half of the lanes skip some loads, and the other half skip them in the next round.
void guarded(const Params p) {
  const int lane = thread_index();
  const uint32_t* const in = static_cast<const uint32_t*>(p.in);
  for (int round = 0; round < 4; round++) {
    uint32_t word = load_global<uint32_t>(in + 32 * round + lane);
    if ((lane + round) % 2)
      for (int i = 0; i < 3; i++) word += load_global<uint32_t>(in + 1024 + 128 * round + 32 * i + lane);
    put_word(p.out, 32 * round + lane, word);
  }
}

uint32_t started = 0;

// out: the numbers of the threads in the order in which they begin.
void order(const Params p) {
  put_word(p.out, started++, uint32_t(thread_index()));
}

cudaError_t launch_selftest(const std::string& name, const Params& params, int threads, int shared_bytes) {
  static const struct {
    const char* name;
    void (*kernel)(Params);
  } kernels[] = {{"exchange", exchange},
                 {"halves", halves},
                 {"many_epochs", many_epochs},
                 {"uninitialized", uninitialized},
                 {"copies", copies},
                 {"deadlock", deadlock},
                 {"outside", outside},
                 {"strided_shared", strided_by_size<false>},
                 {"strided_global", strided_by_size<true>},
                 {"matrix_rows", matrix_rows},
                 {"divergent", divergent},
                 {"guarded", guarded},
                 {"order", order}};
  started = 0;
  for (const auto& entry : kernels)
    if (name == entry.name) return launch(entry.kernel, 1, threads, shared_bytes, nullptr, params);
  return launch_primitive(name.c_str(), params, nullptr);
}

}  // namespace
}  // namespace lowrank_ops

// Runs the kernel `name` on tensors `in` and `out`. Returns the launcher's error; simulator_report says what happened.
extern "C" __attribute__((visibility("default"))) int simulator_selftest(
    const char* name, const void* in, int64_t in_bytes, void* out, int64_t out_bytes, const int64_t* arguments,
    int64_t threads, int64_t shared_bytes, const lowrank_ops::simulator::Settings* settings) {
  using namespace lowrank_ops;
  simulator::forget_everything();
  simulator::machine.settings = *settings;
  simulator::add_buffer("in", in, in_bytes, 4);
  simulator::add_buffer("out", out, out_bytes, 4);
  PrimitiveParams params{in, out, {}};
  for (int i = 0; i < 6; i++) params.argument[i] = arguments[i];
  return launch_selftest(name, params, int(threads), int(shared_bytes));
}
