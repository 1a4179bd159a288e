// Global memory: bounds of each tensor, bytes and sectors. Shared memory: bank conflicts.
//
// Bytes are counted access by access, and for each two bytes of a tensor how often they were read and written.
// Sectors and conflicts are counted by the instructions of warps, which instructions.h finds.
#pragma once

#include <cstdint>
#include <string>

#include "simulator.h"

namespace lowrank_ops::simulator {

// A tensor that kernels may touch. Others do not exist: any access outside of all of them is an error.
void add_buffer(const char* name, const void* data, int64_t bytes, int element);
void forget_everything();  // buffers, counters, error
std::string report();      // JSON

// Checks and counts; returns where to read from, which a setting may have shifted.
const void* read_global(const void* address, int bytes, Primitive primitive, Site site);
void* write_global(void* address, int bytes, Site site);

// Adds to the lane's trace.
inline void record(Fiber& fiber, Primitive primitive, int bytes, int buffer, uintptr_t address, Site site) {
  if (!machine.settings.count) return;
  fiber.warp->traced = true;
  fiber.warp->trace[fiber.lane].push_back({{site, primitive, uint8_t(bytes), int16_t(buffer)}, address});
}

// The lanes have met.
void count_instructions(Warp& warp);
inline void count_traces(Warp& warp) {
  if (warp.traced) count_instructions(warp);
}

// Accesses of `count` lanes to units of `bytes` each that shared memory serves together: the most different words that
// lie in one bank.
int conflict_ways(uintptr_t* address, int count, int bytes);
void count_conflict(Primitive primitive, Site site, int ways);

}  // namespace lowrank_ops::simulator
