#include "simulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <random>

#include "counters.h"
#include "shared_checker.h"

#ifdef LOWRANK_OPS_SWITCH_X86_64
// rdi: where to save this stack's pointer; rsi: the other stack's pointer. The callee-saved registers lie on the
// stacks. `ret` instead of `jmp`, because fibers mostly stop at the same place, so that the return predictor is right.
asm(R"(
.text
.p2align 4
.globl lowrank_ops_switch_stack
.hidden lowrank_ops_switch_stack
.type lowrank_ops_switch_stack, @function
lowrank_ops_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size lowrank_ops_switch_stack, .-lowrank_ops_switch_stack
)");
#endif

namespace lowrank_ops::simulator {

Machine machine;

namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStackBytes = 512 << 10;
#else
constexpr size_t kStackBytes = 128 << 10;
#endif
constexpr size_t kGuardBytes = 4096;
// Shifts the stacks against each other: the busy ends of stacks that lie a power of two apart would all fall into the
// same few sets of the cache.
constexpr size_t kColourBytes = 1024 + 64;

// The stacks of the threads. The page below each can be neither read nor written, so that an overflow is noticed.
struct Stacks {
  char* memory = nullptr;

  char* bottom(int thread) {
    if (memory == nullptr) {
      constexpr size_t bytes = kMaxThreads * (kStackBytes + kGuardBytes);
      memory = static_cast<char*>(
          mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
      if (memory == MAP_FAILED) std::abort();
      for (int i = 0; i < kMaxThreads; i++) mprotect(memory + i * (kStackBytes + kGuardBytes), kGuardBytes, PROT_NONE);
    }
    return memory + thread * (kStackBytes + kGuardBytes) + kGuardBytes;
  }
  static size_t bytes(int thread) { return kStackBytes - thread % kLanes * kColourBytes; }
} stacks;

// Switches to the first thread that can run, or to the host if there is none.
void switch_from(Fiber& fiber, bool last = false) {
  Warp& warp = *fiber.warp;
  Context* next = &machine.host;
  if (warp.runnable != 0) {
    machine.current = warp.in_order[std::countr_zero(warp.runnable)];
    next = &machine.current->context;
  } else {
    machine.ready &= ~warp.bit;
    if (machine.ready != 0) {
      Warp& other = *machine.in_order[std::countr_zero(machine.ready)];
      machine.current = other.in_order[std::countr_zero(other.runnable)];
      next = &machine.current->context;
    }
  }
  switch_context(fiber.context, *next, last);
}

void block(Fiber& fiber) {
  fiber.warp->runnable &= ~fiber.bit;
  switch_from(fiber);
}

// The last thread to arrive switches to the first one in the order of running.
void resume_first(Fiber& fiber, Fiber* first) {
  if (first == &fiber) return;
  machine.current = first;
  switch_context(fiber.context, first->context);
}

void thread_main() {
  entered_context(machine.host);
  machine.body(machine.argument);
  Fiber& fiber = *machine.current;
  if (fiber.first_copy != fiber.copies.size())
    fail({}, "the thread ends with %zu asynchronous copies that it never waited for",
         fiber.copies.size() - fiber.first_copy);
  fiber.finished = true;
  machine.finished++;
  fiber.warp->runnable &= ~fiber.bit;
  switch_from(fiber, true);
  __builtin_unreachable();
}

void order_threads(int64_t block) {
  int warps[kMaxWarps], lanes[kLanes];
  for (int i = 0; i < machine.warps; i++) warps[i] = i;
  for (int i = 0; i < kLanes; i++) lanes[i] = i;
  std::minstd_rand random(unsigned(machine.settings.seed * 7919 + block + 1));
  if (machine.settings.order == 1) {
    std::reverse(warps, warps + machine.warps);
    std::reverse(lanes, lanes + kLanes);
  } else if (machine.settings.order == 2) {
    std::shuffle(warps, warps + machine.warps, random);
  }
  for (int w = 0; w < machine.warps; w++) {
    if (machine.settings.order == 2) std::shuffle(lanes, lanes + kLanes, random);
    Warp& warp = machine.warp[warps[w]];
    machine.in_order[w] = &warp;
    warp.bit = 1u << w;
    for (int i = 0; i < kLanes; i++) {
      Fiber& fiber = machine.fiber[warps[w] * kLanes + lanes[i]];
      warp.in_order[i] = &fiber;
      fiber.bit = 1u << i;
    }
  }
}

void begin_cta(int64_t block) {
  machine.block = block;
  machine.finished = machine.arrived = 0;
  machine.ready = machine.warps == 32 ? ~0u : (1u << machine.warps) - 1;
  for (int t = 0; t < machine.threads; t++) {
    Fiber& fiber = machine.fiber[t];
    fiber.warp = &machine.warp[t / kLanes];
    fiber.thread = t;
    fiber.lane = t % kLanes;
    fiber.finished = false;
    fiber.waits_in = Primitive::kCount;
    fiber.copies.clear();
    fiber.first_copy = 0;
    fiber.committed = fiber.retired = 0;
    begin_context(fiber.context, stacks.bottom(t), stacks.bytes(t), thread_main);
  }
  for (int w = 0; w < machine.warps; w++) {
    Warp& warp = machine.warp[w];
    warp.index = w;
    warp.runnable = ~0u;
    warp.epoch = 0;
    warp.arrived = 0;
    for (auto& trace : warp.trace) trace.clear();
    warp.traced = false;
  }
  order_threads(block);
  begin_shared();
}

// No thread can run, and some have not finished.
void describe_deadlock() {
  const Fiber* examples[int(Primitive::kCount) + 1] = {};
  int counts[int(Primitive::kCount) + 1] = {};
  for (int t = 0; t < machine.threads; t++) {
    const Fiber& fiber = machine.fiber[t];
    const int state = fiber.finished ? int(Primitive::kCount) : int(fiber.waits_in);
    counts[state]++;
    if (examples[state] == nullptr) examples[state] = &fiber;
  }
  std::string text = "deadlock in block " + std::to_string(machine.block) + ":";
  for (int state = 0; state < int(Primitive::kCount); state++) {
    if (counts[state] == 0) continue;
    const Fiber& fiber = *examples[state];
    text += " " + std::to_string(counts[state]) + " threads wait in " + name_of(Primitive(state)) + " (thread " +
            std::to_string(fiber.thread) + " at " + fiber.waits_at.file + ":" + std::to_string(fiber.waits_at.line) +
            "),";
  }
  machine.error = text + " " + std::to_string(machine.finished) + " have ended";
}

void complete(Warp& warp) {
  warp.arrived = 0;
  machine.instructions[int(warp.kind)]++;
  count_traces(warp);
  if (warp.kind == Primitive::kLoadMatrices) {
    load_matrices(warp);
  } else if (warp.kind == Primitive::kWarpBarrier) {
    machine.barriers[warp.barrier_id]++;
    if (++warp.epoch == kMaxWarpEpoch)
      fail(warp.site, "more warp barriers between two CTA barriers than can be counted");
  } else {
    multiply(warp, warp.kind);
  }
}

}  // namespace

const char* name_of(Primitive primitive) {
  static const char* const names[] = {
      "load_shared",        "store_shared",       "load_matrices",      "copy_async",   "load_global", "store_global",
      "multiply_add<bf16>", "multiply_add<fp16>", "multiply_add<tf32>", "warp_barrier", "barrier",     "commit_copies"};
  return names[int(primitive)];
}

void fail(Site site, const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  machine.error = std::string(text) + " (block " + std::to_string(machine.block) + ", thread " +
                  std::to_string(machine.current->thread);
  if (site.file != nullptr) machine.error += std::string(", ") + site.file + ":" + std::to_string(site.line);
  machine.error += ")";
  switch_context(machine.current->context, machine.host, true);
  __builtin_unreachable();
}

void collective(Primitive kind, int barrier_id, Site site) {
  Fiber& fiber = *machine.current;
  Warp& warp = *fiber.warp;
  fiber.waits_in = kind;
  fiber.waits_at = site;
  if (warp.arrived == 0) {
    warp.kind = kind;
    warp.barrier_id = barrier_id;
    warp.site = site;
  } else if (warp.kind != kind || warp.barrier_id != barrier_id || (barrier_id < 0 && !(warp.site == site))) {
    fail(site, "the lanes of a warp meet in different instructions: %s %d at %s:%d and %s %d", name_of(warp.kind),
         warp.barrier_id, warp.site.file, warp.site.line, name_of(kind), barrier_id);
  }
  if (++warp.arrived < kLanes) {
    block(fiber);
  } else {
    complete(warp);
    warp.runnable = ~0u;
    resume_first(fiber, warp.in_order[0]);
  }
}

void cta_barrier(int id, Site site) {
  Fiber& fiber = *machine.current;
  fiber.waits_in = Primitive::kBarrier;
  fiber.waits_at = site;
  if (machine.arrived == 0)
    machine.barrier_id = id;
  else if (machine.barrier_id != id)
    fail(site, "threads of a CTA meet in different barriers: %d and %d", machine.barrier_id, id);
  if (++machine.arrived < machine.threads) {
    block(fiber);
  } else {
    machine.arrived = 0;
    machine.barriers[id]++;
    for (int w = 0; w < machine.warps; w++) {
      Warp& warp = machine.warp[w];
      count_traces(warp);
      warp.runnable = ~0u;
      warp.epoch = 0;
    }
    machine.ready = machine.warps == 32 ? ~0u : (1u << machine.warps) - 1;
    next_epoch();
    resume_first(fiber, machine.in_order[0]->in_order[0]);
  }
}

bool run(int64_t ctas, int threads, int64_t shared_bytes, void (*body)(const void*), const void* argument) {
  if (!machine.error.empty()) return false;  // an earlier launch of the same call failed
  machine.threads = threads;
  machine.warps = threads / kLanes;
  machine.body = body;
  machine.argument = argument;
  machine.launches++;
  machine.blocks = ctas;
  machine.largest_shared = std::max(machine.largest_shared, shared_bytes);
  allocate_shared(shared_bytes);
  for (int64_t block = 0; block < ctas && machine.error.empty(); block++) {
    begin_cta(block);
    machine.current = machine.in_order[0]->in_order[0];
    switch_context(machine.host, machine.current->context);
    if (machine.error.empty() && machine.finished < threads) describe_deadlock();
    for (int w = 0; w < machine.warps && machine.error.empty(); w++) count_traces(machine.warp[w]);
    machine.ctas++;
  }
  release_shared();
  return machine.error.empty();
}

}  // namespace lowrank_ops::simulator
