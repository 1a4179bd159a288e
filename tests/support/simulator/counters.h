// Counters. Global memory: bounds of each tensor, bytes and sectors. Shared memory: bank conflicts.
//
// Bytes are counted per access; each two bytes of a tensor count how often they were read and written. Sectors and
// conflicts are counted per instruction of a warp; instructions.h finds the instructions.
#pragma once

#include <cstdint>
#include <string>

#include "simulator.h"

namespace lowrank_ops::simulator {

// Registers a tensor that kernels may access. An access outside of all registered tensors is an error.
void add_buffer(const char* name, const void* data, int64_t bytes, int element);
void forget_everything();  // buffers, counters, error
std::string report();      // JSON

// Checks and counts an access. Returns the address to read from, which the setting shift_buffer may shift.
const void* read_global(const void* address, int bytes, Primitive primitive, Site site);
void* write_global(void* address, int bytes, Site site);

// Adds an access to the lane's trace.
inline void record(Fiber& fiber, Primitive primitive, int bytes, int buffer, uintptr_t address, Site site) {
  if (!machine.settings.count) return;
  fiber.warp->traced = true;
  fiber.warp->trace[fiber.lane].push_back({{site, primitive, uint8_t(bytes), int16_t(buffer)}, address});
}

// To be called when the lanes have met: merges their traces into instructions and counts those.
void count_instructions(Warp& warp);
inline void count_traces(Warp& warp) {
  if (warp.traced) count_instructions(warp);
}

// The degree of the bank conflict of `count` lanes that access `bytes` bytes each and are served together: the largest
// number of different words in one bank.
int conflict_ways(uintptr_t* address, int count, int bytes);
void count_conflict(Primitive primitive, Site site, int ways);

}  // namespace lowrank_ops::simulator
