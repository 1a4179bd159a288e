// Pages for memory that is prefetched.
//
// Fresh memory has no pages until it is read or written: outputs above the allocator's threshold (32 MB with glibc),
// and smaller ones after the heap was trimmed. A prefetch of such memory walks through the page table in vain, and so
// does the next one: 64 walks per page, which took 3 to 15 times as long as getting the page itself on a Zen 1. So a
// page is written to before its lines are prefetched.
#pragma once

#include <cstdint>

namespace lowrank_ops {

// `count` rows of `bytes` bytes, each `stride` bytes from the next.
struct MemoryRows {
  const char* first = nullptr;
  int64_t count = 0, bytes = 0, stride = 0;
};

constexpr int64_t kPageBytes = 4096;  // the smallest size of a page

// Writes to every page of rows of an output, none of whose values is written yet. Inputs need no such access: they were
// written before (except those of torch.zeros, which cost more once), and reading a value of each page took 10 % of a
// call on images beyond L3.
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
