// Packing: a weight's rows -> panels (kernels.h), in blocks of lanes x lanes that are transposed in registers.
#pragma once

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/vector.h"

namespace lowrank_ops {
namespace LOWRANK_ISA {

// Reads rows of the weight as vectors along the depth, and writes rows of the panel as vectors along the columns. Depth
// is counted in units of `T`: one element, or a pair of bf16 as one 32-bit element. There are `units`, zeros at the end
// included; the first `whole` have all of their elements. load_whole(column, k) gives a column's vector of units from
// k, load_end the same where the depth ends within it.
template <typename T, typename LoadWhole, typename LoadEnd>
static inline void pack_blocks(const PackCall& call, T* panel, int64_t whole, int64_t units,
                               const LoadWhole& load_whole, const LoadEnd& load_end) {
  using V = typename Vector<T>::Type;
  constexpr int kLanes = Vector<T>::kLanes;
  const int64_t columns = call.width, padded = call.padded_width, stride = call.panel_stride;  // no store changes them
  for (int64_t column = 0; column < padded; column += kLanes) {
    for (int64_t k = 0; k < units; k += kLanes) {
      V block[kLanes];
      if (columns - column >= kLanes && whole - k >= kLanes) {
#pragma GCC unroll 16
        for (int c = 0; c < kLanes; ++c) block[c] = load_whole(column + c, k);
      } else {
        for (int c = 0; c < kLanes; ++c) block[c] = column + c < columns ? load_end(column + c, k) : V{};
      }
      transpose(block);
      T* out = panel + k * stride + column;
      if (units - k >= kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(out + i * stride, block[i]);
      } else {
        for (int i = 0; i < units - k; ++i) store(out + i * stride, block[i]);
      }
    }
  }
}

template <typename T, typename In>
static void pack_panel(const PackCall& call) {
  constexpr int kLanes = Vector<T>::kLanes;
  T* panel = static_cast<T*>(call.panel);
  const In* weight = static_cast<const In*>(call.weight);
  for (int64_t tap = 0; tap < call.num_taps;
       ++tap, weight += call.depth, panel += call.padded_depth * call.panel_stride) {
    const auto load_whole = [&](int64_t column, int64_t k) {
      const In* source = weight + column * call.row_stride + k;
      __builtin_prefetch(source + kLanes * call.row_stride, 0, 2);  // the next columns
      return load(source);
    };
    const auto load_end = [&](int64_t column, int64_t k) {
      const int64_t left = call.depth - k;
      return load_part(weight + column * call.row_stride + k, left < kLanes ? left : kLanes);
    };
    pack_blocks<T>(call, panel, call.depth, call.padded_depth, load_whole, load_end);
  }
}

static void pack_panel_pairs(const PackCall& call) {
  constexpr int kLanes = Vector<float>::kLanes;
  float* panel = static_cast<float*>(call.panel);
  const BFloat16* weight = static_cast<const BFloat16*>(call.weight);
  const int64_t pairs = call.padded_depth / 2;
  for (int64_t tap = 0; tap < call.num_taps; ++tap, weight += call.depth, panel += pairs * call.panel_stride) {
    const auto load_whole = [&](int64_t column, int64_t k) {
      const BFloat16* source = weight + column * call.row_stride + 2 * k;
      __builtin_prefetch(source + kLanes * call.row_stride, 0, 2);  // the next columns
      return load(reinterpret_cast<const float*>(source));
    };
    const auto load_end = [&](int64_t column, int64_t k) {
      const int64_t left = call.depth - 2 * k;  // odd at the end of an odd depth
      Float part = Float{};
      memcpy(&part, weight + column * call.row_stride + 2 * k, size_t(left < 2 * kLanes ? left : 2 * kLanes) * 2);
      return part;
    };
    pack_blocks<float>(call, panel, call.depth / 2, pairs, load_whole, load_end);
  }
}

}  // namespace LOWRANK_ISA
}  // namespace lowrank_ops
