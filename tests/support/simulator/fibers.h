// The threads of a CTA as fibers: one stack per thread, and a switch that saves six registers. Where there is no
// assembly below, the C library's ucontext serves, which makes a system call per switch. A CTA of a Tucker block of 64
// channels (128 threads, 4000 warp-wide instructions) takes 4.7 ms with the assembly, 36 ms with ucontext.
#pragma once

#include <cstddef>

#if defined(__x86_64__) && !defined(LOWRANK_OPS_UCONTEXT)
#define LOWRANK_OPS_SWITCH_X86_64
#endif
#ifndef LOWRANK_OPS_SWITCH_X86_64
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace lowrank_ops::simulator {

// The point at which a fiber (or the host's own thread) continues when it is switched to.
struct Context {
#ifdef LOWRANK_OPS_SWITCH_X86_64
  void* stack_pointer = nullptr;
#else
  ucontext_t registers;
#endif
  const void* bottom = nullptr;  // of the stack; AddressSanitizer needs it
  size_t bytes = 0;
};

#ifdef LOWRANK_OPS_SWITCH_X86_64
extern "C" void lowrank_ops_switch_stack(void** save, void* next);
#endif

// Makes `context` begin with `entry`, which never returns, on a stack of `bytes` from `bottom`.
inline void begin_context(Context& context, void* bottom, size_t bytes, void (*entry)()) {
  context.bottom = bottom;
  context.bytes = bytes;
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(bottom, bytes);  // frames of the last CTA, in case it stopped in the middle
#endif
#ifdef LOWRANK_OPS_SWITCH_X86_64
  // Six registers, the return address, and one word of padding: functions expect the stack pointer 8 bytes off a
  // multiple of 16.
  void** top = reinterpret_cast<void**>(static_cast<char*>(bottom) + bytes / 16 * 16);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  context.stack_pointer = top;
#else
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = bottom;
  context.registers.uc_stack.ss_size = bytes;
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, entry, 0);
#endif
}

// Continues in `to`; returns when something switches back to `from`. `last`: nothing will switch back.
inline void switch_context(Context& from, Context& to, [[maybe_unused]] bool last = false) {
#ifdef __SANITIZE_ADDRESS__
  void* frames = nullptr;
  __sanitizer_start_switch_fiber(last ? nullptr : &frames, to.bottom, to.bytes);
#endif
#ifdef LOWRANK_OPS_SWITCH_X86_64
  lowrank_ops_switch_stack(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.registers, &to.registers);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(frames, nullptr, nullptr);
#endif
}

// To be called first in a fiber. `host` learns the bounds of its own stack.
inline void entered_context([[maybe_unused]] Context& host) {
#ifdef __SANITIZE_ADDRESS__
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (host.bottom == nullptr) host.bottom = bottom, host.bytes = bytes;
#endif
}

}  // namespace lowrank_ops::simulator
