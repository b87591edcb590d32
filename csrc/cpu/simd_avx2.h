// Float vectors of AVX2 and FMA. The set of functions is the same in every simd_<tier>.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "llm2_fast/dtype.h"

namespace llm2_fast {
namespace avx2 {

using Vec = __m256;
constexpr int kLanes = 8;
constexpr int kHeadsAtOnce = 2;         // query heads whose accumulators fit the registers, see branch_attention.h
constexpr int kRowsAtOnce = 5;          // rows whose sums fit the registers, see linear.h
constexpr int kRowsAtOnceInGroups = 4;  // with the sums of a group of int8 weights beside

static inline Vec set1(float x) {
  return _mm256_set1_ps(x);
}
static inline Vec add(Vec a, Vec b) {
  return _mm256_add_ps(a, b);
}
static inline Vec sub(Vec a, Vec b) {
  return _mm256_sub_ps(a, b);
}
static inline Vec mul(Vec a, Vec b) {
  return _mm256_mul_ps(a, b);
}
static inline Vec fma(Vec a, Vec b, Vec c) {
  return _mm256_fmadd_ps(a, b, c);
}
static inline Vec div(Vec a, Vec b) {
  return _mm256_div_ps(a, b);
}

// Lanes of `negative` where x has a minus sign, else of `other`.
static inline Vec where_negative(Vec x, Vec negative, Vec other) {
  return _mm256_blendv_ps(other, negative, x);
}

// a where a > b, else b: a NaN in b is kept, a NaN in a is dropped.
static inline Vec max(Vec a, Vec b) {
  return _mm256_max_ps(a, b);
}

// Bit i is set where a[i] >= b[i]; NaN compares false.
static inline uint32_t at_least(Vec a, Vec b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
}

// 2**n for a whole n in [-127, 127] that is given as n + 1.5 * 2**23; zero for -127.
static inline Vec exp2_of_shifted(Vec shifted) {
  const __m256i biased = _mm256_add_epi32(_mm256_castps_si256(shifted), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}

static inline Vec load(const float* p) {
  return _mm256_loadu_ps(p);
}
static inline Vec load(const BFloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
static inline Vec load(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

// Of kLanes pairs at p, the first or the second of each. Memory is little-endian.
static inline Vec load_first_of_pairs(const BFloat16* p) {
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
}
static inline Vec load_second_of_pairs(const BFloat16* p) {
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(-0x10000)));
}

// The first n < kLanes elements at p, and `fill` in the other lanes.
template <typename T>
static inline Vec load_partial(const T* p, int n, float fill) {
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = i < n ? to_float(p[i]) : fill;
  return load(lanes);
}

static inline void store(float* p, Vec v) {
  _mm256_storeu_ps(p, v);
}
// The same bits as from_float's.
static inline void store(BFloat16* p, Vec v) {
  const __m256i bits = _mm256_castps_si256(v),
                lowest = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), lowest);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i result = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
  const __m128i low = _mm256_castsi256_si128(result), high = _mm256_extracti128_si256(result, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(low, high));
}

// Sum of the lanes, in an order that is fixed: halves first.
static inline float sum_lanes(Vec v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// Largest lane; NaN lanes are dropped or returned.
static inline float max_lane(Vec v) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

static inline void transpose(Vec (&rows)[kLanes]) {
  Vec pairs[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  // Half L of fours[j + c] holds column 4 * L + c of the rows j .. j + 3.
  Vec fours[kLanes];
  for (int j = 0; j < kLanes; j += 4) {
    for (int half = 0; half < 2; ++half) {
      const __m256d a = _mm256_castps_pd(pairs[j + half]), b = _mm256_castps_pd(pairs[j + half + 2]);
      fours[j + 2 * half] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
      fours[j + 2 * half + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
    }
  }
  for (int c = 0; c < 4; ++c) {
    rows[c] = _mm256_permute2f128_ps(fours[c], fours[4 + c], 0x20);
    rows[4 + c] = _mm256_permute2f128_ps(fours[c], fours[4 + c], 0x31);
  }
}

}  // namespace avx2
}  // namespace llm2_fast
