// Vector math shared by the kernels, in terms of a tier's Vec.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "llm2_fast/dtype.h"

namespace llm2_fast {
namespace LLM2_FAST_TIER {

constexpr float kInfinity = __builtin_inff();

// exp(x) for x <= 0, within 2 ulp near zero; exactly 1 for 0, exactly 0 below -88, NaN for NaN.
// exp(x) = 2**n * 2**f with n whole and |f| <= 1/2; 2**f is 1 + f * q(f), q fitted on Chebyshev nodes to 5e-9.
static inline Vec exp_nonpositive(Vec x) {
  const Vec magic = set1(12582912.0f);  // 1.5 * 2**23: adding it rounds to a whole number
  const Vec t = max(set1(-127.0f), mul(x, set1(1.44269504f)));
  const Vec shifted = add(t, magic);
  const Vec f = sub(t, sub(shifted, magic));
  Vec q = set1(1.54614483e-4f);
  q = fma(q, f, set1(1.33908667e-3f));
  q = fma(q, f, set1(9.61805704e-3f));
  q = fma(q, f, set1(5.55035695e-2f));
  q = fma(q, f, set1(2.40226507e-1f));
  q = fma(q, f, set1(6.93147182e-1f));
  return mul(fma(q, f, set1(1.0f)), exp2_of_shifted(shifted));
}

static inline float exp_nonpositive(float x) {
  float lanes[kLanes];
  store(lanes, exp_nonpositive(set1(x)));
  return lanes[0];
}

// Largest of n elements, -inf for none. NaN elements are ignored.
template <typename T>
static float maximum(const T* x, int64_t n) {
  Vec largest[4] = {set1(-kInfinity), set1(-kInfinity), set1(-kInfinity), set1(-kInfinity)};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int k = 0; k < 4; ++k) largest[k] = max(load(x + i + k * kLanes), largest[k]);
  }
  for (; i + kLanes <= n; i += kLanes) largest[0] = max(load(x + i), largest[0]);
  if (i < n) largest[1] = max(load_partial(x + i, static_cast<int>(n - i), -kInfinity), largest[1]);
  return max_lane(max(max(largest[0], largest[1]), max(largest[2], largest[3])));
}

// Sum of exp(x - base) over n elements, none of them above `base`. NaN if an element is NaN.
template <typename T>
static float sum_exp(const T* x, int64_t n, float base) {
  const Vec offset = set1(base);
  Vec sum[2] = {set1(0.0f), set1(0.0f)};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    for (int k = 0; k < 2; ++k) sum[k] = add(sum[k], exp_nonpositive(sub(load(x + i + k * kLanes), offset)));
  }
  for (; i + kLanes <= n; i += kLanes) sum[0] = add(sum[0], exp_nonpositive(sub(load(x + i), offset)));
  if (i < n) {
    const Vec tail = load_partial(x + i, static_cast<int>(n - i), -kInfinity);
    sum[1] = add(sum[1], exp_nonpositive(sub(tail, offset)));
  }
  return sum_lanes(add(sum[0], sum[1]));
}

struct RowStats {
  float max;
  float sum_exp;  // of exp(x - max); NaN if any element is NaN

  // The row has no NaN and its maximum is finite.
  bool usable() const { return fabsf(max) <= FLT_MAX && sum_exp == sum_exp; }
  float logsumexp() const { return max + logf(sum_exp); }
};

constexpr int64_t kStatsBlock = 1024;  // elements; stays in the first-level cache between its two visits

// Maximum and sum of exponentials of a row in one pass over memory. `block_max`, unless null, receives the maximum of
// each `block` elements.
template <typename T>
static RowStats row_stats(const T* x, int64_t n, int64_t block, float* block_max) {
  RowStats stats = {-kInfinity, 0.0f};
  for (int64_t begin = 0; begin < n; begin += block) {
    const int64_t size = n - begin < block ? n - begin : block;
    const float largest = maximum(x + begin, size);
    if (block_max != nullptr) block_max[begin / block] = largest;
    const float new_max = largest > stats.max ? largest : stats.max;
    // While everything so far is -inf any finite base will do: the terms are 0, or NaN, which must not be lost.
    const float base = new_max == -kInfinity ? 0.0f : new_max;
    stats.sum_exp = stats.sum_exp * exp_nonpositive(stats.max - base) + sum_exp(x + begin, size, base);
    stats.max = new_max;
  }
  return stats;
}

template <typename T>
static RowStats row_stats(const T* x, int64_t n) {
  return row_stats(x, n, kStatsBlock, static_cast<float*>(nullptr));
}

// Calls visit(i), i ascending, for the elements in [begin, end) for whose vector `where` sets the bit. `where` is
// evaluated anew for each vector, so a visit may narrow it.
template <typename T, typename Where, typename Visit>
static inline void visit_where(const T* x, int64_t begin, int64_t end, const Where& where, const Visit& visit) {
  for (int64_t i = begin; i < end; i += kLanes) {
    uint32_t bits;
    if (i + kLanes <= end) {
      bits = where(load(x + i));
    } else {
      const int rest = static_cast<int>(end - i);
      bits = where(load_partial(x + i, rest, -kInfinity)) & ((1u << rest) - 1);
    }
    for (; bits != 0; bits &= bits - 1) visit(i + __builtin_ctz(bits));
  }
}

}  // namespace LLM2_FAST_TIER
}  // namespace llm2_fast
