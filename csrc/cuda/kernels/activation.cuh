// The activations, on values in registers.
#pragma once

#include <cmath>

#include "plan/problem.h"

#ifdef __CUDACC__
#define LOWRANK_OPS_INLINE __device__ __forceinline__
#else
#define LOWRANK_OPS_INLINE inline
#endif

namespace lowrank_ops {

template <int size, typename Sum>
LOWRANK_OPS_INLINE void activate(Sum (&values)[size], Activation activation) {
  // One switch for all values. The comparisons are written such that a NaN stays a NaN.
  const auto each = [&](auto function) {
#pragma unroll
    for (Sum& x : values) x = function(x);
  };
  const auto clamp6 = [](Sum x) { return x < Sum(0) ? Sum(0) : x > Sum(6) ? Sum(6) : x; };
  switch (activation) {
    case Activation::kNone:
      break;
    case Activation::kRelu:
      each([](Sum x) { return x < Sum(0) ? Sum(0) : x; });
      break;
    case Activation::kRelu6:
      each(clamp6);
      break;
    case Activation::kHardswish:
      each([&](Sum x) { return x * clamp6(x + Sum(3)) / Sum(6); });
      break;
    case Activation::kSilu:
      each([](Sum x) { return x / (Sum(1) + exp(-x)); });
      break;
    case Activation::kGelu:
      each([](Sum x) { return x * Sum(0.5) * (Sum(1) + erf(x * Sum(0.70710678118654752440))); });
      break;
  }
}

}  // namespace lowrank_ops
