// Arithmetic on whole numbers, in host and device code.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define LOWRANK_OPS_BOTH __host__ __device__
#else
#define LOWRANK_OPS_BOTH
#endif

namespace lowrank_ops {

LOWRANK_OPS_BOTH constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
LOWRANK_OPS_BOTH constexpr int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

}  // namespace lowrank_ops
