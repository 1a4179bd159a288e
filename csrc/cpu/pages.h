// Memory that is asked for before it is used.
//
// Memory that nobody has used yet has no pages until it is read or written: outputs above the allocator's threshold (32
// MB with glibc), and smaller ones after the heap was trimmed. A prefetch of such memory finds no page, gives up after
// a walk through the page table, and the next one of the same page walks again: 64 walks in vain a page, which took 3
// to 15 times as long as the page itself on a Zen 1. So each page is written to before its lines are asked for.
#pragma once

#include <cstdint>

namespace lowrank_ops {

// `count` rows of `bytes` bytes, each `stride` bytes from the next.
struct MemoryRows {
  const char* first = nullptr;
  int64_t count = 0, bytes = 0, stride = 0;
};

constexpr int64_t kPageBytes = 4096;  // the smallest that there are

// Writes to every page of rows of an output, none of whose values is written yet. Inputs get no such access: others
// have written them (torch.zeros may not have, and costs more once), and waiting for a value of each page took 10 % of
// a call on images beyond L3.
inline void map_for_writing(const MemoryRows& rows) {
  const auto write = [](const char* byte) { *static_cast<volatile char*>(const_cast<char*>(byte)) = 0; };
  if (rows.bytes <= 0) return;
  for (int64_t row = 0; row < rows.count; ++row) {
    const char* first = rows.first + row * rows.stride;
    for (int64_t byte = 0; byte < rows.bytes; byte += kPageBytes) write(first + byte);
    write(first + rows.bytes - 1);  // rows begin anywhere in a page
  }
}

}  // namespace lowrank_ops
