// Winograd's patches: ways to run a Tucker block's core of stride and dilation 1 with fewer products (cpu/winograd.h).
#pragma once

#include <cstdint>

#include "plan/integers.h"

namespace lowrank_ops {

enum class Winograd { kNone, k2x2, k4x4, kLine };
constexpr Winograd kPatches[] = {Winograd::k2x2, Winograd::k4x4, Winograd::kLine};

// F(rows x columns, 3 x 3), or F(3, 3) along a line of 1xKW taps, once per three taps.
struct Patch {
  int64_t rows, columns;  // of outputs
  int64_t places;         // products for these outputs, per channel and group of taps
  const char* name;
};
constexpr Patch patch_of(Winograd winograd) {
  switch (winograd) {
    case Winograd::k2x2:
      return {2, 2, 16, "2x2"};
    case Winograd::k4x4:
      return {4, 4, 36, "4x4"};
    case Winograd::kLine:
      return {1, 3, 5, "line"};
    case Winograd::kNone:
      break;
  }
  return {1, 1, 0, "never"};
}

// How many groups of three taps the sums of a place run over. A line's patch is also the next group of the patch
// before.
constexpr int64_t tap_groups(Winograd winograd, int64_t kw) {
  return winograd == Winograd::kLine ? ceil_div(kw, int64_t(3)) : 1;
}

}  // namespace lowrank_ops
