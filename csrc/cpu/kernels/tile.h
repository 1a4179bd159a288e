// Moving data between strided images and tiles, in blocks of lanes x lanes that are transposed in registers.
#pragma once

#include "cpu/kernels/kernels.h"
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

}  // namespace LOWRANK_ISA
}  // namespace lowrank_ops
