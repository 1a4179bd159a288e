// Threads of a CTA as fibers: a stack each, and a switch that saves six registers. ucontext, which the C library
// offers, makes two system calls a switch and takes 60 times as long; it serves where there is no assembly below.
#pragma once

#include <cstddef>

#ifndef __x86_64__
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace lowrank_ops::simulator {

// Where a fiber (or the host's own thread) goes on when it is switched to.
struct Context {
#ifdef __x86_64__
  void* stack_pointer = nullptr;
#else
  ucontext_t registers;
#endif
  const void* bottom = nullptr;  // of the stack, for AddressSanitizer
  size_t bytes = 0;
};

#ifdef __x86_64__
extern "C" void lowrank_ops_switch_stack(void** save, void* next);
#endif

// Makes `context` begin with `entry`, which never returns, on a stack of `bytes` from `bottom`.
inline void begin_context(Context& context, void* bottom, size_t bytes, void (*entry)()) {
  context.bottom = bottom;
  context.bytes = bytes;
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(bottom, bytes);  // frames of the last CTA, if it was given up in the middle
#endif
#ifdef __x86_64__
  // Six registers, the address to return to, and one word of padding: functions expect the stack pointer 8 off 16.
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

// Goes on in `to`; returns when something switches back to `from`. `last`: nothing will.
inline void switch_context(Context& from, Context& to, [[maybe_unused]] bool last = false) {
#ifdef __SANITIZE_ADDRESS__
  void* frames = nullptr;
  __sanitizer_start_switch_fiber(last ? nullptr : &frames, to.bottom, to.bytes);
#endif
#ifdef __x86_64__
  lowrank_ops_switch_stack(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.registers, &to.registers);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(frames, nullptr, nullptr);
#endif
}

// First thing in a fiber. `host` learns its own stack.
inline void entered_context([[maybe_unused]] Context& host) {
#ifdef __SANITIZE_ADDRESS__
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (host.bottom == nullptr) host.bottom = bottom, host.bytes = bytes;
#endif
}

}  // namespace lowrank_ops::simulator
