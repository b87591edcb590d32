// Float vectors of AVX-512 (F, BW, DQ, VL). The set of functions is the same in every simd_<tier>.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "llm2_fast/dtype.h"

namespace llm2_fast {
namespace avx512 {

using Vec = __m512;
constexpr int kLanes = 16;
constexpr int kHeadsAtOnce = 4;         // query heads whose accumulators fit the registers, see branch_attention.h
constexpr int kRowsAtOnce = 12;         // rows whose sums fit the registers, see linear.h
constexpr int kRowsAtOnceInGroups = 6;  // with the sums of a group of int8 weights beside

static inline Vec set1(float x) {
  return _mm512_set1_ps(x);
}
static inline Vec add(Vec a, Vec b) {
  return _mm512_add_ps(a, b);
}
static inline Vec sub(Vec a, Vec b) {
  return _mm512_sub_ps(a, b);
}
static inline Vec mul(Vec a, Vec b) {
  return _mm512_mul_ps(a, b);
}
static inline Vec fma(Vec a, Vec b, Vec c) {
  return _mm512_fmadd_ps(a, b, c);
}
static inline Vec div(Vec a, Vec b) {
  return _mm512_div_ps(a, b);
}

// Lanes of `negative` where x has a minus sign, else of `other`.
static inline Vec where_negative(Vec x, Vec negative, Vec other) {
  return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(x)), other, negative);
}

// a where a > b, else b: a NaN in b is kept, a NaN in a is dropped.
static inline Vec max(Vec a, Vec b) {
  return _mm512_max_ps(a, b);
}

// Bit i is set where a[i] >= b[i]; NaN compares false.
static inline uint32_t at_least(Vec a, Vec b) {
  return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ);
}

// 2**n for a whole n in [-127, 127] that is given as n + 1.5 * 2**23; zero for -127.
static inline Vec exp2_of_shifted(Vec shifted) {
  const __m512i biased = _mm512_add_epi32(_mm512_castps_si512(shifted), _mm512_set1_epi32(127));
  return _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23));
}

static inline Vec widen(__m256i bfloat16s) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bfloat16s), 16));
}

static inline Vec load(const float* p) {
  return _mm512_loadu_ps(p);
}
static inline Vec load(const BFloat16* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline Vec load(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

// Of kLanes pairs at p, the first or the second of each. Memory is little-endian.
static inline Vec load_first_of_pairs(const BFloat16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16));
}
static inline Vec load_second_of_pairs(const BFloat16* p) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(-0x10000)));
}

// The first n < kLanes elements at p, and `fill` in the other lanes.
static inline Vec load_partial(const float* p, int n, float fill) {
  return _mm512_mask_loadu_ps(set1(fill), static_cast<__mmask16>((1u << n) - 1), p);
}
static inline Vec load_partial(const BFloat16* p, int n, float fill) {
  const __mmask16 mask = static_cast<__mmask16>((1u << n) - 1);
  return _mm512_mask_mov_ps(set1(fill), mask, widen(_mm256_maskz_loadu_epi16(mask, p)));
}

static inline void store(float* p, Vec v) {
  _mm512_storeu_ps(p, v);
}
// The same bits as from_float's.
static inline void store(BFloat16* p, Vec v) {
  const __m512i bits = _mm512_castps_si512(v),
                lowest = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), lowest);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x00400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16)));
}

// Sum of the lanes, in an order that is fixed: halves first.
static inline float sum_lanes(Vec v) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// Largest lane; NaN lanes are dropped or returned.
static inline float max_lane(Vec v) {
  const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

static inline void transpose(Vec (&rows)[kLanes]) {
  Vec pairs[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  // Quarter L of fours[j + c] holds column 4 * L + c of the rows j .. j + 3.
  Vec fours[kLanes];
  for (int j = 0; j < kLanes; j += 4) {
    for (int half = 0; half < 2; ++half) {
      const __m512d a = _mm512_castps_pd(pairs[j + half]), b = _mm512_castps_pd(pairs[j + half + 2]);
      fours[j + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      fours[j + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
  for (int c = 0; c < 4; ++c) {
    const Vec even_low = _mm512_shuffle_f32x4(fours[c], fours[4 + c], 0x88);
    const Vec odd_low = _mm512_shuffle_f32x4(fours[c], fours[4 + c], 0xdd);
    const Vec even_high = _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], 0x88);
    const Vec odd_high = _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], 0xdd);
    rows[c] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
    rows[4 + c] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
    rows[8 + c] = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
    rows[12 + c] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
  }
}

}  // namespace avx512
}  // namespace llm2_fast
