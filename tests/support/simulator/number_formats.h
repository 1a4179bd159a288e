// bf16, fp16 and tf32, rounded as the GPU does. Written out, because g++ 12 has no bf16 and its fp16 needs F16C.
#pragma once

#include <bit>
#include <cstdint>

namespace lowrank_ops::simulator {

constexpr uint16_t kNaN16 = 0x7fff;      // CUDA's conversions return this for every NaN
constexpr uint32_t kNaN32 = 0x7fffffff;  // cvt.rna.tf32.f32 returns this for every NaN

inline bool is_nan(uint32_t bits) {
  return (bits & 0x7fffffff) > 0x7f800000;
}

inline float bfloat16_to_float(uint16_t bits) {
  return std::bit_cast<float>(uint32_t(bits) << 16);
}

inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (is_nan(bits)) return kNaN16;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float half_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31, mantissa = bits & 1023;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000 | mantissa << 13);
  if (exponent == 0) {  // zero and subnormals: an integer number of 2^-24
    const float magnitude = float(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return std::bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
}

inline uint16_t float_to_half(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value), magnitude = bits & 0x7fffffff;
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  if (is_nan(bits)) return kNaN16;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65520 and above round to infinity
  if (magnitude < 0x38800000) {
    // Subnormal: in the sum with 0.5 the last bit stands for 2^-24, and the addition rounds to nearest even.
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return sign | uint16_t(std::bit_cast<uint32_t>(shifted) - 0x3f000000);
  }
  return sign | uint16_t((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

// cvt.rna.tf32.f32: to nearest, ties away from zero; 10 bits of mantissa stay.
inline uint32_t round_tf32(uint32_t bits) {
  if (is_nan(bits)) return kNaN32;
  if ((bits & 0x7fffffff) == 0x7f800000) return bits;
  return (bits + 0x1000) & 0xffffe000;
}

// Whether a word is a tf32: the low 13 bits are zero. What the tensor cores do with other bits is not specified.
inline bool is_tf32(uint32_t bits) {
  return (bits & 0x1fff) == 0 || is_nan(bits);
}

}  // namespace lowrank_ops::simulator
