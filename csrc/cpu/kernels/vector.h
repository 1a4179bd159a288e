// Vectors of one instruction set: types, loads with conversion, stores, activations, transposition.
//
// Included only by kernels_<isa>.cpp. Everything lives in the namespace LOWRANK_ISA of that file, and no template of
// the standard library is used: two instruction sets must never share a symbol, or the linker could hand the AVX-512
// version of it to a machine without AVX-512.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "plan/problem.h"

namespace lowrank_ops {
namespace LOWRANK_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// A vector of accumulators: kLanes floats or doubles, and the vectors of integers of the same shape.
template <typename T>
struct Vector;
template <>
struct Vector<float> {
  static constexpr int kLanes = kVectorBytes / 4;
  typedef float Type __attribute__((vector_size(kVectorBytes)));
  typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4)));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t Narrow __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint16_t NarrowUnaligned __attribute__((vector_size(kVectorBytes / 2), aligned(2)));
};
template <>
struct Vector<double> {
  static constexpr int kLanes = kVectorBytes / 8;
  typedef double Type __attribute__((vector_size(kVectorBytes)));
  typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8)));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
};
using Float = Vector<float>::Type;
using Double = Vector<double>::Type;
using FloatBits = Vector<float>::Bits;
using FloatInt = Vector<float>::Int;

template <typename V>
static inline V broadcast(decltype(+V{}[0]) value) {
  return value - V{};  // x - 0 is x, the zeros' signs included: compiles to a broadcast
}

// ---- loads: kLanes elements of any tensor type as accumulators
static inline Float load(const float* p) {
  return *reinterpret_cast<const Vector<float>::Unaligned*>(p);
}
static inline Double load(const double* p) {
  return *reinterpret_cast<const Vector<double>::Unaligned*>(p);
}
static inline Float load(const BFloat16* p) {
  const Vector<float>::Narrow narrow = *reinterpret_cast<const Vector<float>::NarrowUnaligned*>(p);
  return (Float)(__builtin_convertvector(narrow, FloatBits) << 16);
}
static inline float half_to_float(uint16_t h) {
  // Shift the exponent and mantissa into place, then scale by 2^112: exact for subnormals as well.
  const uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = uint32_t(h & 0x7fff) << 13;
  uint32_t bits;
  if ((h & 0x7c00) == 0x7c00) {
    bits = magnitude | 0x7f800000;
  } else {
    float scaled;
    memcpy(&scaled, &magnitude, 4);
    scaled *= 0x1p112f;
    memcpy(&bits, &scaled, 4);
  }
  bits |= sign;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
static inline Float load(const Half* p) {
#if defined(__AVX512F__)
  return (Float)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (Float)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Float value;
  for (int i = 0; i < Vector<float>::kLanes; ++i) value[i] = half_to_float(p[i].bits);
  return value;
#endif
}

// ---- stores: kLanes accumulators as elements of any tensor type, rounded to nearest even
static inline void store(float* p, Float v) {
  *reinterpret_cast<Vector<float>::Unaligned*>(p) = v;
}
static inline void store(double* p, Double v) {
  *reinterpret_cast<Vector<double>::Unaligned*>(p) = v;
}
static inline Vector<float>::Narrow to_bfloat16(Float v) {
#if defined(__AVX512BF16__)
  // One instruction instead of nine; it flushes subnormals (below 1.2e-38) to zero, as the dot product does.
  return (Vector<float>::Narrow)_mm512_cvtneps_pbh((__m512)v);
#endif
  const FloatBits bits = (FloatBits)v;
  const FloatBits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const FloatBits nan = (FloatBits)(v != v);
  return __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), Vector<float>::Narrow);
}
static inline void store(BFloat16* p, Float v) {
  *reinterpret_cast<Vector<float>::NarrowUnaligned*>(p) = to_bfloat16(v);
}
static inline uint16_t float_to_half(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and up round to infinity
  if (magnitude < 0x38800000) {                                 // subnormal: let the fp32 adder round at the right bit
    float scaled;
    memcpy(&scaled, &magnitude, 4);
    scaled += 0.5f;
    uint32_t sum;
    memcpy(&sum, &scaled, 4);
    return uint16_t(sign | (sum - 0x3f000000));
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return uint16_t(sign | ((rounded - 0x38000000) >> 13));
}
static inline void store(Half* p, Float v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < Vector<float>::kLanes; ++i) p[i].bits = float_to_half(v[i]);
#endif
}

// ---- the first `count` lanes only; memory behind them is not touched. Lanes that are not loaded are zero.
#if defined(__AVX512F__)
static inline Float load_part(const float* p, int64_t count) {
  return (Float)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
}
static inline Double load_part(const double* p, int64_t count) {
  return (Double)_mm512_maskz_loadu_pd(__mmask8((1u << count) - 1), p);
}
static inline Float load_part(const BFloat16* p, int64_t count) {
  const __m256i narrow = _mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), p);
  return (Float)_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16);
}
static inline Float load_part(const Half* p, int64_t count) {
  return (Float)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), p));
}
static inline void store_part(float* p, Float v, int64_t count) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), (__m512)v);
}
static inline void store_part(double* p, Double v, int64_t count) {
  _mm512_mask_storeu_pd(p, __mmask8((1u << count) - 1), (__m512d)v);
}
static inline void store_part(BFloat16* p, Float v, int64_t count) {
  _mm256_mask_storeu_epi16(p, __mmask16((1u << count) - 1), (__m256i)to_bfloat16(v));
}
static inline void store_part(Half* p, Float v, int64_t count) {
  const __m256i narrow = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
  _mm256_mask_storeu_epi16(p, __mmask16((1u << count) - 1), narrow);
}
#else
// For types and machines without masked loads: by way of memory.
template <typename Element>
static inline auto load_part(const Element* p, int64_t count) {
  Element whole[kVectorBytes / 4];
  memset(static_cast<void*>(whole), 0, sizeof(whole));
  memcpy(static_cast<void*>(whole), p, size_t(count) * sizeof(Element));
  return load(whole);
}
#if defined(__AVX2__)
static inline Float load_part(const float* p, int64_t count) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return (Float)_mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(int(count)), lanes));
}
static inline Double load_part(const double* p, int64_t count) {
  const __m256i lanes = _mm256_setr_epi64x(0, 1, 2, 3);
  return (Double)_mm256_maskload_pd(p, _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), lanes));
}
// Stores the first `bytes` of these 32 bytes, in powers of two: a masked store takes some 40 instructions on older AMD
// CPUs.
static inline void store_bytes(void* to, __m128i low, __m128i high, int64_t bytes) {
  char* p = static_cast<char*>(to);
  if (bytes & 16) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), low);
    low = high;
    p += 16;
  }
  if (bytes & 8) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), low);
    low = _mm_srli_si128(low, 8);
    p += 8;
  }
  if (bytes & 4) {
    const int32_t value = _mm_cvtsi128_si32(low);
    memcpy(p, &value, 4);
    low = _mm_srli_si128(low, 4);
    p += 4;
  }
  if (bytes & 2) {
    const int16_t value = int16_t(_mm_cvtsi128_si32(low));
    memcpy(p, &value, 2);
  }
}
template <typename Element, typename V>
static inline void store_part(Element* p, V v, int64_t count) {
  if (count == int64_t(sizeof(V) / sizeof(v[0]))) return store(p, v);
  Element whole[kVectorBytes / sizeof(Element)];  // the compiler keeps it in registers
  store(whole, v);
  const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(whole));
  const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(whole) + 1);
  store_bytes(p, low, high, count * int64_t(sizeof(Element)));
}
#else
template <typename Element, typename V>
static inline void store_part(Element* p, V v, int64_t count) {
  Element whole[kVectorBytes / 4];
  store(whole, v);
  memcpy(static_cast<void*>(p), whole, size_t(count) * sizeof(Element));
}
// Value by value: reading a vector from memory would wait for its parts, which were just written there.
static inline Float load_part(const float* p, int64_t count) {
  return Float{p[0], count > 1 ? p[1] : 0, count > 2 ? p[2] : 0, count > 3 ? p[3] : 0};
}
static inline void store_part(float* p, Float v, int64_t count) {
  for (int i = 0; i < 4; ++i)
    if (i < count) p[i] = v[i];
}
#endif
#endif

// ---- activations
template <typename V>
static inline V select(decltype(V{} < V{}) mask, V a, V b) {
  return mask ? a : b;
}
// A NaN must stay a NaN, as in torch: comparisons are written so that a NaN takes the branch that keeps it.
template <typename V>
static inline V clamp_below(V v, V bound) {
  return select<V>(v < bound, bound, v);
}
template <typename V>
static inline V clamp_above(V v, V bound) {
  return select<V>(v > bound, bound, v);
}

// exp(x): x = n ln 2 + r with |r| <= ln 2 / 2, Taylor series of degree 7 in r (truncation 3e-9), times 2^n in two steps
// so that results in the subnormal range come out right.
static inline Float exp_vector(Float x) {
  const Float bounded = clamp_above(clamp_below(x, broadcast<Float>(-104.f)), broadcast<Float>(89.f));
  const Float shift = broadcast<Float>(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const Float n = (bounded * 1.442695041f + shift) - shift;
  const Float r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;
  Float p = broadcast<Float>(1.f / 5040);
  p = p * r + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  const FloatInt whole = __builtin_convertvector(select<Float>(n == n, n, Float{}), FloatInt);
  const FloatInt half = whole >> 1;
  return p * (Float)((half + 127) << 23) * (Float)((whole - half + 127) << 23);
}
static inline Float silu(Float x) {
  // Beyond 88 the exponential is infinite and the quotient 0, where fp32's own result is below 1e-36.
  return x / (1.f + exp_vector(-x));
}
static inline Double silu(Double x) {
  Double y;
  for (int i = 0; i < Vector<double>::kLanes; ++i) y[i] = x[i] / (1 + ::exp(-x[i]));
  return y;
}
// gelu calls the C library's erf lane by lane: exact, and slow only in calls that use gelu.
static inline Float gelu(Float x) {
  Float y;
  for (int i = 0; i < Vector<float>::kLanes; ++i) y[i] = 0.5f * x[i] * (1.f + ::erff(x[i] * 0.70710678118654752f));
  return y;
}
static inline Double gelu(Double x) {
  Double y;
  for (int i = 0; i < Vector<double>::kLanes; ++i) y[i] = 0.5 * x[i] * (1 + ::erf(x[i] * 0.70710678118654752440));
  return y;
}

template <typename V>
static inline V activate(V v, Activation activation) {
  switch (activation) {
    case Activation::kNone:
      return v;
    case Activation::kRelu:
      return clamp_below(v, V{});
    case Activation::kRelu6:
      return clamp_above(clamp_below(v, V{}), broadcast<V>(6));
    case Activation::kHardswish:
      return v * clamp_above(clamp_below(v + 3, V{}), broadcast<V>(6)) / 6;
    case Activation::kSilu:
      return silu(v);
    case Activation::kGelu:
      return gelu(v);
  }
  return v;
}

// ---- transposition of a kLanes x kLanes block in registers. Two rounds of interleaving within 128 bits are followed
// by two that exchange 128-bit lanes: they need no index registers and overwrite no operand, so that 32 registers
// suffice.
#if defined(__AVX512F__)
static inline void transpose(Float (&row)[16]) {
  __m512 even[16], quad[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    even[i] = _mm512_unpacklo_ps((__m512)row[i], (__m512)row[i + 1]);
    even[i + 1] = _mm512_unpackhi_ps((__m512)row[i], (__m512)row[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const auto pairs = [&](int j) { return _mm512_castps_pd(even[j]); };
    quad[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(pairs(i), pairs(i + 2)));
    quad[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pairs(i), pairs(i + 2)));
    quad[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pairs(i + 1), pairs(i + 3)));
    quad[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pairs(i + 1), pairs(i + 3)));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 a = _mm512_shuffle_f32x4(quad[i], quad[4 + i], 0x88),
                 b = _mm512_shuffle_f32x4(quad[i], quad[4 + i], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(quad[8 + i], quad[12 + i], 0x88),
                 d = _mm512_shuffle_f32x4(quad[8 + i], quad[12 + i], 0xdd);
    row[i] = (Float)_mm512_shuffle_f32x4(a, c, 0x88);
    row[4 + i] = (Float)_mm512_shuffle_f32x4(b, d, 0x88);
    row[8 + i] = (Float)_mm512_shuffle_f32x4(a, c, 0xdd);
    row[12 + i] = (Float)_mm512_shuffle_f32x4(b, d, 0xdd);
  }
}
#endif

// The same for other widths: log2(kLanes) rounds that interleave halves.
template <typename V, int kLanes>
static inline void transpose(V (&row)[kLanes]) {
  typedef decltype(V{} < V{}) Index;
  Index low, high;
  for (int i = 0; i < kLanes; ++i) {
    low[i] = (i % 2) * kLanes + i / 2;
    high[i] = (i % 2) * kLanes + i / 2 + kLanes / 2;
  }
  for (int round = 1; round < kLanes; round *= 2) {
    V next[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = __builtin_shuffle(row[i], row[i + kLanes / 2], low);
      next[2 * i + 1] = __builtin_shuffle(row[i], row[i + kLanes / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) row[i] = next[i];
  }
}

}  // namespace LOWRANK_ISA
}  // namespace lowrank_ops
