// Float vectors of four lanes in the vector extension that GCC and Clang share, which becomes SSE2 or NEON. The set of
// functions is the same in every simd_<tier>.h.
#pragma once

#include <cstdint>
#include <cstring>
#ifdef __ARM_FEATURE_FMA
#include <arm_neon.h>
#endif

#include "llm2_fast/dtype.h"

namespace llm2_fast {
namespace portable {

using Vec = float __attribute__((vector_size(16)));
using Words = uint32_t __attribute__((vector_size(16)));
constexpr int kLanes = 4;
constexpr int kHeadsAtOnce = 2;         // query heads whose accumulators fit the registers, see branch_attention.h
constexpr int kRowsAtOnce = 4;          // rows whose sums fit the registers, see linear.h
constexpr int kRowsAtOnceInGroups = 4;  // with the sums of a group of int8 weights beside

static inline Vec set1(float x) {
  return Vec{x, x, x, x};
}
static inline Vec add(Vec a, Vec b) {
  return a + b;
}
static inline Vec sub(Vec a, Vec b) {
  return a - b;
}
static inline Vec mul(Vec a, Vec b) {
  return a * b;
}
static inline Vec fma(Vec a, Vec b, Vec c) {
#ifdef __ARM_FEATURE_FMA
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}
static inline Vec div(Vec a, Vec b) {
  return a / b;
}

// Lanes of `negative` where x has a minus sign, else of `other`.
static inline Vec where_negative(Vec x, Vec negative, Vec other) {
  using Integers = int32_t __attribute__((vector_size(16)));
  Integers bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits < 0 ? negative : other;
}

// a where a > b, else b: a NaN in b is kept, a NaN in a is dropped.
static inline Vec max(Vec a, Vec b) {
  return a > b ? a : b;
}

// Bit i is set where a[i] >= b[i]; NaN compares false.
static inline uint32_t at_least(Vec a, Vec b) {
  const auto lanes = a >= b;
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(lanes[i] & 1) << i;
  return bits;
}

static inline Vec float_of(Words words) {
  Vec v;
  std::memcpy(&v, &words, sizeof(v));
  return v;
}

// 2**n for a whole n in [-127, 127] that is given as n + 1.5 * 2**23; zero for -127.
static inline Vec exp2_of_shifted(Vec shifted) {
  Words words;
  std::memcpy(&words, &shifted, sizeof(words));
  return float_of((words + 127u) << 23);
}

static inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
static inline Vec load(const BFloat16* p) {
  return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
static inline Vec load(const int8_t* p) {
  using Integers = int32_t __attribute__((vector_size(16)));
  uint32_t bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
  // Each byte to the top of its lane, from where an arithmetic shift extends its sign.
  const Words tops = Words{bytes, bytes, bytes, bytes} * Words{1u << 24, 1u << 16, 1u << 8, 1u};
  Integers integers;
  std::memcpy(&integers, &tops, sizeof(integers));
  return __builtin_convertvector(integers >> 24, Vec);
}

// Of kLanes pairs at p, the first or the second of each.
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the first of a pair is the lower half of a word");
static inline Words load_pairs(const BFloat16* p) {
  Words words;
  std::memcpy(&words, p, sizeof(words));
  return words;
}
static inline Vec load_first_of_pairs(const BFloat16* p) {
  return float_of(load_pairs(p) << 16);
}
static inline Vec load_second_of_pairs(const BFloat16* p) {
  return float_of(load_pairs(p) & 0xffff0000u);
}

// The first n < kLanes elements at p, and `fill` in the other lanes.
template <typename T>
static inline Vec load_partial(const T* p, int n, float fill) {
  Vec v = set1(fill);
  for (int i = 0; i < n; ++i) v[i] = to_float(p[i]);
  return v;
}

static inline void store(float* p, Vec v) {
  std::memcpy(p, &v, sizeof(v));
}
static inline void store(BFloat16* p, Vec v) {
  for (int i = 0; i < kLanes; ++i) from_float(v[i], p + i);
}

// Sum of the lanes, in an order that is fixed: halves first.
static inline float sum_lanes(Vec v) {
  return (v[0] + v[2]) + (v[1] + v[3]);
}

// Largest lane; NaN lanes are dropped or returned.
static inline float max_lane(Vec v) {
  float largest = v[0];
  for (int i = 1; i < kLanes; ++i) largest = v[i] > largest ? v[i] : largest;
  return largest;
}

static inline void transpose(Vec (&rows)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const float swapped = rows[i][j];
      rows[i][j] = rows[j][i];
      rows[j][i] = swapped;
    }
  }
}

}  // namespace portable
}  // namespace llm2_fast
