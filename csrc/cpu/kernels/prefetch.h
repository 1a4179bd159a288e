// Prefetches, for the kernels and for the code that calls them.
#pragma once

#include <cstdint>

namespace lowrank_ops {

// Prefetches the first `used_bytes` bytes of `rows` rows, each `row_bytes` from the next, to L2. kWrite: they will be
// written. Hardware prefetchers stop at every page.
//
// Always inlined, for two reasons: each instruction set has its own code (kernels/vector.h), and gcc takes a function
// that only prefetches for one without effects and drops the calls of it.
template <bool kWrite>
__attribute__((always_inline)) static inline void prefetch_rows(const char* first, int64_t rows, int64_t row_bytes,
                                                                int64_t used_bytes) {
  for (int64_t row = 0; row < rows; ++row, first += row_bytes)
    for (int64_t byte = 0; byte < used_bytes; byte += 64) __builtin_prefetch(first + byte, kWrite, 2);
}

}  // namespace lowrank_ops
