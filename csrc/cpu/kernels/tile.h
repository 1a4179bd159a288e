// Moving data: strided image -> tile, tile -> strided image, weight -> packed panels; and CP's depthwise stages.
// All of it works in blocks of lanes x lanes that are transposed in registers.
#pragma once

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/plane.h"
#include "cpu/kernels/vector.h"

namespace lowrank_ops {
namespace LOWRANK_ISA {

// One element of `In` converted to the tile's type.
template <typename Tile, typename In>
static inline Tile convert(In value) {
  if constexpr (sizeof(Tile) == sizeof(In)) {
    Tile same;  // float -> float, double -> double, BFloat16 -> BFloat16
    memcpy(static_cast<void*>(&same), &value, sizeof(Tile));
    return same;
  } else {
    return Tile(load_part(&value, 1)[0]);  // BFloat16 or Half -> float
  }
}

// Pixels x channels of a block, transposed: vectors along the pixels come in (`load_channel(channel, pixel, pixels)`),
// vectors along the channels go out, `unit` tile elements a lane.
template <typename V, typename Tile, typename Load>
static inline void transpose_in(const LoadCall& call, int64_t channels, int64_t unit, const Load& load_channel) {
  constexpr int kLanes = sizeof(V) / sizeof(V{}[0]);
  for (int64_t channel = 0; channel < channels; channel += kLanes) {
    const int64_t here = channels - channel < kLanes ? channels - channel : kLanes;
    for (int64_t pixel = 0; pixel < call.pixels; pixel += kLanes) {
      const int64_t pixels = call.pixels - pixel < kLanes ? call.pixels - pixel : kLanes;
      V block[kLanes];
      if (here == kLanes) {
#pragma GCC unroll 16
        for (int c = 0; c < kLanes; ++c) block[c] = load_channel(channel + c, pixel, pixels);
      } else {
        for (int c = 0; c < kLanes; ++c) block[c] = c < here ? load_channel(channel + c, pixel, pixels) : V{};
      }
      transpose(block);
      auto* target = reinterpret_cast<decltype(+V{}[0])*>(static_cast<Tile*>(call.tile) + pixel * call.tile_stride +
                                                          channel * unit);
      const int64_t stride = call.tile_stride / unit;
      if (here == kLanes && pixels == kLanes) {
#pragma GCC unroll 16
        for (int p = 0; p < kLanes; ++p) store(target + p * stride, block[p]);
      } else {
        for (int p = 0; p < pixels; ++p) store_part(target + p * stride, block[p], here);
      }
    }
  }
}

template <typename Tile, typename In>
static inline void load_transposed(const LoadCall& call) {
  const In* in = static_cast<const In*>(call.in);
  transpose_in<typename Vector<Tile>::Type, Tile>(
      call, call.channels, 1, [&](int64_t channel, int64_t pixel, int64_t pixels) {
        const In* source = in + channel * call.channel_stride + pixel;
        return pixels == Vector<Tile>::kLanes ? load(source) : load_part(source, pixels);
      });
}

// bf16 stays bf16: two channels make one 32-bit element, so pairs of channels are transposed.
static inline void load_transposed_pairs(const LoadCall& call) {
  const BFloat16* in = static_cast<const BFloat16*>(call.in);
  const auto row = [&](int64_t channel, int64_t pixel, int64_t pixels) -> FloatBits {
    if (channel >= call.channels) return FloatBits{};
    const BFloat16* source = in + channel * call.channel_stride + pixel;
    return (FloatBits)(pixels == Vector<float>::kLanes ? load(source) : load_part(source, pixels));
  };
  transpose_in<Float, BFloat16>(call, (call.channels + 1) / 2, 2, [&](int64_t pair, int64_t pixel, int64_t pixels) {
    return (Float)((row(2 * pair, pixel, pixels) >> 16) | row(2 * pair + 1, pixel, pixels));
  });
}

template <typename Tile, typename In>
static void load_tile(const LoadCall& call) {
  const In* in = static_cast<const In*>(call.in);
  Tile* tile = static_cast<Tile*>(call.tile);
  constexpr bool kSame = sizeof(Tile) == sizeof(In);
  if (call.channel_stride == 1) {
    for (int64_t pixel = 0; pixel < call.pixels; ++pixel) {
      const In* source = in + pixel * call.pixel_stride;
      Tile* target = tile + pixel * call.tile_stride;
      if constexpr (kSame) {
        memcpy(static_cast<void*>(target), source, size_t(call.channels) * sizeof(In));
      } else {
        constexpr int kLanes = Vector<float>::kLanes;
        int64_t channel = 0;
        for (; channel + kLanes <= call.channels; channel += kLanes) store(target + channel, load(source + channel));
        if (channel < call.channels) {
          const int64_t left = call.channels - channel;
          store_part(target + channel, load_part(source + channel, left), left);
        }
      }
    }
  } else if (call.pixel_stride == 1) {
    if constexpr (sizeof(Tile) == 2)
      return load_transposed_pairs(call);  // pads to even channels itself
    else
      load_transposed<Tile, In>(call);
  } else {
    for (int64_t pixel = 0; pixel < call.pixels; ++pixel)
      for (int64_t channel = 0; channel < call.channels; ++channel)
        tile[pixel * call.tile_stride + channel] =
            convert<Tile>(in[pixel * call.pixel_stride + channel * call.channel_stride]);
  }
  if (sizeof(Tile) == 2 && call.channels % 2)
    for (int64_t pixel = 0; pixel < call.pixels; ++pixel)
      memset(static_cast<void*>(tile + pixel * call.tile_stride + call.channels), 0, sizeof(Tile));
}

template <typename Out, typename T>
static void store_transposed(const StoreCall& call) {
  using V = typename Vector<T>::Type;
  constexpr int kLanes = Vector<T>::kLanes;
  const T* tile = static_cast<const T*>(call.tile);
  Out* out = static_cast<Out*>(call.out);
  for (int64_t channel = 0; channel < call.channels; channel += kLanes) {
    const int64_t channels = call.channels - channel < kLanes ? call.channels - channel : kLanes;
    for (int64_t pixel = 0; pixel < call.pixels; pixel += kLanes) {
      const int64_t pixels = call.pixels - pixel < kLanes ? call.pixels - pixel : kLanes;
      V block[kLanes];
      const T* source = tile + pixel * call.tile_stride + channel;
      Out* target = out + channel * call.channel_stride + pixel;
      if (pixels == kLanes && channels == kLanes) {
#pragma GCC unroll 16
        for (int p = 0; p < kLanes; ++p) block[p] = load(source + p * call.tile_stride);
        transpose(block);
#pragma GCC unroll 16
        for (int c = 0; c < kLanes; ++c) store(target + c * call.channel_stride, block[c]);
      } else {
        for (int p = 0; p < kLanes; ++p)
          block[p] = p < pixels ? load_part(source + p * call.tile_stride, channels) : V{};
        transpose(block);
        for (int c = 0; c < channels; ++c) store_part(target + c * call.channel_stride, block[c], pixels);
      }
    }
  }
}

// Rows of the weight come in as vectors along the depth, rows of the panel go out as vectors along the columns. In
// units of `T`: one element, or a pair of bf16 as one 32-bit element. `whole` units have all of their elements; `load`
// gives the vector of a column from a unit on, `load_end` the same where the depth ends within it. The row of the next
// columns is asked for.
template <typename T, typename Load, typename LoadEnd>
static inline void pack_blocks(const PackCall& call, T* panel, int64_t whole, int64_t units, const Load& load_whole,
                               const LoadEnd& load_end) {
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
      __builtin_prefetch(source + kLanes * call.row_stride, 0, 2);
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
      __builtin_prefetch(source + kLanes * call.row_stride, 0, 2);
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

// Many taps: so many sums side by side, or each waits for its own last addition and each product reads its weight.
constexpr int kSumsTogether = 8;

// Vertical taps into a column buffer in L1, horizontal taps out of it; one vector of channels at a time, its weights in
// registers when the kernel is at most kTaps long.
template <typename T, typename Out, int kTaps>
static void depthwise_taps(const DepthwiseCall& call, int64_t row) {
  using V = typename Vector<T>::Type;
  constexpr int kLanes = Vector<T>::kLanes;
  T* column = static_cast<T*>(call.column);
  const int64_t kh = kTaps ? kTaps : call.kh, kw = kTaps ? kTaps : call.kw;
  V weight[kTaps ? kTaps : 1];
  for (int64_t channel = 0; channel < call.channels; channel += kLanes) {
    const T* height = static_cast<const T*>(call.height_factor) + channel;
    const T* width = static_cast<const T*>(call.width_factor) + channel;
    if constexpr (kTaps > 0)
      for (int i = 0; i < kTaps; ++i) weight[i] = load(height + i * call.channel_stride);
    int64_t p = 0;
    if constexpr (kTaps == 0) {
      for (; p + kSumsTogether <= call.in_pixels; p += kSumsTogether) {
        V sums[kSumsTogether];
#pragma GCC unroll 8
        for (int j = 0; j < kSumsTogether; ++j) sums[j] = V{};
        for (int64_t i = 0; i < kh; ++i) {
          const V w = load(height + i * call.channel_stride);
          const T* first = static_cast<const T*>(call.rows[row + i]) + p * call.channel_stride + channel;
#pragma GCC unroll 8
          for (int j = 0; j < kSumsTogether; ++j) sums[j] += load(first + j * call.channel_stride) * w;
        }
#pragma GCC unroll 8
        for (int j = 0; j < kSumsTogether; ++j) store(column + (p + j) * kLanes, sums[j]);
      }
    }
    for (; p < call.in_pixels; ++p) {
      V sum = V{};
#pragma GCC unroll 8
      for (int64_t i = 0; i < kh; ++i) {
        const V w = kTaps ? weight[kTaps ? i : 0] : load(height + i * call.channel_stride);
        sum += load(static_cast<const T*>(call.rows[row + i]) + p * call.channel_stride + channel) * w;
      }
      store(column + p * kLanes, sum);
    }
    if constexpr (kTaps > 0)
      for (int i = 0; i < kTaps; ++i) weight[i] = load(width + i * call.channel_stride);
    Out* out = static_cast<Out*>(call.out) + row * call.out_row_stride + channel;
    int64_t o = 0;
    if constexpr (kTaps == 0) {
      // The last ones may overlap.
      constexpr int kSums = kSumsTogether;
      while (o < call.out_pixels && call.out_pixels >= kSums) {
        o = o + kSums <= call.out_pixels ? o : call.out_pixels - kSums;
        V sums[kSums];
#pragma GCC unroll 8
        for (int j = 0; j < kSums; ++j) sums[j] = V{};
        const T* first = column + o * call.stride * kLanes;
        for (int64_t i = 0; i < kw; ++i, first += call.dilation * kLanes) {
          const V w = load(width + i * call.channel_stride);
#pragma GCC unroll 8
          for (int j = 0; j < kSums; ++j) sums[j] += load(first + j * call.stride * kLanes) * w;
        }
#pragma GCC unroll 8
        for (int j = 0; j < kSums; ++j) store(out + (o + j) * call.channel_stride, sums[j]);
        o += kSums;
      }
    }
    for (; o < call.out_pixels; ++o) {
      V sum = V{};
#pragma GCC unroll 8
      for (int64_t i = 0; i < kw; ++i) {
        const V w = kTaps ? weight[kTaps ? i : 0] : load(width + i * call.channel_stride);
        sum += load(column + (o * call.stride + i * call.dilation) * kLanes) * w;
      }
      store(out + o * call.channel_stride, sum);
    }
  }
}

// 3x3 taps of stride and dilation 1, for kRows output rows from `row` and kVectors vectors of channels: the vertical
// sums of the last three pixels stay in registers while the window slides along the row; what two output rows both need
// is loaded once. Several vectors, although not all of their sums fit the registers: pixels lie channel_stride apart,
// and rows in L2 come a single line a pixel at half the speed (256 channels, 56 pixels, Zen 5: 29 and 12 cycles).
template <typename T, typename Out, int kRows, int kVectors>
static inline void depthwise_window(const DepthwiseCall& call, int64_t row, int64_t channel) {
  using V = typename Vector<T>::Type;
  constexpr int kLanes = Vector<T>::kLanes;
  const int64_t stride = call.channel_stride;
  const T* height = static_cast<const T*>(call.height_factor) + channel;
  const T* width = static_cast<const T*>(call.width_factor) + channel;
  V h[3][kVectors], w[3][kVectors];
#pragma GCC unroll 3
  for (int tap = 0; tap < 3; ++tap)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      h[tap][v] = load(height + tap * stride + v * kLanes);
      w[tap][v] = load(width + tap * stride + v * kLanes);
    }
  const T* in[kRows + 2];
  for (int i = 0; i < kRows + 2; ++i) in[i] = static_cast<const T*>(call.rows[row + i]) + channel;
  Out* out[kRows];
  for (int i = 0; i < kRows; ++i) out[i] = static_cast<Out*>(call.out) + (row + i) * call.out_row_stride + channel;
  typedef V Column[kRows][kVectors];
  const auto load_column = [&](Column& column, int64_t pixel) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      V value[kRows + 2];
#pragma GCC unroll 4
      for (int i = 0; i < kRows + 2; ++i) value[i] = load(in[i] + pixel * stride + v * kLanes);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        column[i][v] = V{};
#pragma GCC unroll 3
        for (int tap = 0; tap < 3; ++tap) column[i][v] += value[i + tap] * h[tap][v];
      }
    }
  };
  const auto write = [&](int64_t pixel, const Column& left, const Column& middle, const Column& right) {
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        V sum = V{};
        sum += left[i][v] * w[0][v];
        sum += middle[i][v] * w[1][v];
        sum += right[i][v] * w[2][v];
        store(out[i] + pixel * stride + v * kLanes, sum);
      }
  };
  Column first, second, third;
  load_column(first, 0);
  load_column(second, 1);
  int64_t pixel = 0;
  for (; pixel + 3 <= call.out_pixels; pixel += 3) {
    load_column(third, pixel + 2);
    write(pixel, first, second, third);
    load_column(first, pixel + 3);
    write(pixel + 1, second, third, first);
    load_column(second, pixel + 4);
    write(pixel + 2, third, first, second);
  }
  for (; pixel < call.out_pixels; ++pixel) {
    load_column(third, pixel + 2);
    write(pixel, first, second, third);
    memcpy(&first, &second, sizeof(first));
    memcpy(&second, &third, sizeof(second));
  }
}

template <typename T, typename Out, int kRows>
static inline void depthwise_windows(const DepthwiseCall& call, int64_t row) {
  constexpr int kLanes = Vector<T>::kLanes, kVectors = kVectorBytes == 64 ? 4 : 2;
  int64_t channel = 0;
  for (; channel + kVectors * kLanes <= call.channels; channel += kVectors * kLanes)
    depthwise_window<T, Out, kRows, kVectors>(call, row, channel);
  for (; channel < call.channels; channel += kLanes) depthwise_window<T, Out, kRows, 1>(call, row, channel);
}

// 1x1, what a pointwise convolution's CP has between its factors: nothing but a scale for each channel, and no column.
template <typename T, typename Out>
static void depthwise_point(const DepthwiseCall& call) {
  using V = typename Vector<T>::Type;
  constexpr int kLanes = Vector<T>::kLanes;
  const T* height = static_cast<const T*>(call.height_factor);
  const T* width = static_cast<const T*>(call.width_factor);
  for (int64_t row = 0; row < call.out_rows; ++row) {
    const T* in = static_cast<const T*>(call.rows[row]);
    Out* out = static_cast<Out*>(call.out) + row * call.out_row_stride;
    for (int64_t p = 0; p < call.out_pixels; ++p) {
      for (int64_t channel = 0; channel < call.channels; channel += kLanes) {
        V column = V{}, sum = V{};
        column += load(in + channel) * load(height + channel);
        sum += column * load(width + channel);
        store(out + channel, sum);
      }
      in += call.stride * call.channel_stride;
      out += call.channel_stride;
    }
  }
}

template <typename T, typename Out>
static void depthwise(const DepthwiseCall& call) {
  if constexpr (sizeof(Out) == sizeof(T))
    if (call.channel_stride == 1) return depthwise_plane<T>(call);
  if (call.kh == 1 && call.kw == 1) return depthwise_point<T, Out>(call);
  int64_t row = 0;
  if (call.kh == 3 && call.kw == 3 && call.stride == 1 && call.dilation == 1) {
    constexpr int kRows = kVectorBytes == 64 ? 2 : 1;  // as the number of registers allows
    for (; row + kRows <= call.out_rows; row += kRows) depthwise_windows<T, Out, kRows>(call, row);
    for (; row < call.out_rows; ++row) depthwise_windows<T, Out, 1>(call, row);
    return;
  }
  for (; row < call.out_rows; ++row) {
    if (call.kh == 3 && call.kw == 3)
      depthwise_taps<T, Out, 3>(call, row);
    else if (call.kh == 5 && call.kw == 5)
      depthwise_taps<T, Out, 5>(call, row);
    else
      depthwise_taps<T, Out, 0>(call, row);
  }
}

}  // namespace LOWRANK_ISA
}  // namespace lowrank_ops
