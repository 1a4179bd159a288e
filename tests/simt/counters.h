// Global memory: bounds of each tensor, bytes and sectors. Shared memory: bank conflicts.
//
// Bytes are counted access by access, and for each two bytes of a tensor how often they were read and written.
// Sectors and conflicts belong to an instruction of a warp, but here its lanes run one after the other. So each lane
// leaves its accesses in a log of its warp, and until the lanes meet again (barrier, load_matrices, multiply_add) the
// next accesses of the lanes from the same line of the source are taken for one instruction: what one lane did and
// another skipped is passed over. Exact where the lanes take the same way; where a condition inside a loop differs
// between lanes, an instruction may be taken apart or two mixed up (never fewer bytes; more sectors rather than
// fewer). Tests that hold sectors and conflicts therefore use whole tiles.
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

// Whether a lane's access can be part of an instruction.
inline bool same_instruction(const Instruction& instruction, int lane, Primitive primitive, int bytes, int buffer,
                             Site site) {
  return instruction.site == site && instruction.primitive == primitive && !(instruction.lanes >> lane & 1) &&
         instruction.buffer == buffer && instruction.bytes == bytes;
}

// The slower half of `record`.
Instruction* find_instruction(Warp& warp, uint32_t& cursor, int lane, Primitive primitive, int bytes, int buffer,
                              Site site);

inline void record(Fiber& fiber, Primitive primitive, int bytes, int buffer, uintptr_t address, Site site) {
  if (!machine.settings.count) return;
  Warp& warp = *fiber.warp;
  uint32_t& cursor = warp.cursor[fiber.lane];
  const uint32_t next = warp.log[cursor].next;
  Instruction* instruction = &warp.log[next];
  if (next != 0 && same_instruction(*instruction, fiber.lane, primitive, bytes, buffer, site)) [[likely]]
    cursor = next;
  else
    instruction = find_instruction(warp, cursor, fiber.lane, primitive, bytes, buffer, site);
  instruction->lanes |= 1u << fiber.lane;
  instruction->address[fiber.lane] = address;
}

// The lanes have met: counts what is in the log.
void count_log(Warp& warp);
inline void flush_log(Warp& warp) {
  if (warp.log.size() > 1) count_log(warp);
}

// Accesses of `count` lanes to units of `bytes` each that shared memory serves together: the most different words that
// lie in one bank.
int conflict_ways(uintptr_t* address, int count, int bytes);
void count_conflict(Primitive primitive, Site site, int ways);

}  // namespace lowrank_ops::simulator
