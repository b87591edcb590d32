// AVX-512 with dot products of bfloat16, two products per lane, summed in float32, and with byte permutations (VBMI).
#include <cstring>

#include "simd_avx512.h"
#define LLM2_FAST_TIER avx512_bf16
namespace llm2_fast {
namespace avx512_bf16 {
using namespace avx512;
}
}  // namespace llm2_fast
#include "multiply_add.h"

namespace llm2_fast {
namespace avx512_bf16 {

// The bytes of 0 to 127 as bfloat16, which holds them exactly.
struct SmallIntegers {
  alignas(64) uint8_t low[128] = {};
  alignas(64) uint8_t high[128] = {};

  constexpr SmallIntegers() {
    for (int exponent = 0; exponent < 7; ++exponent) {
      for (int value = 1 << exponent; value < 2 << exponent; ++value) {
        const int bits = (127 + exponent) << 7 | ((value << (7 - exponent)) & 0x7f);
        low[value] = static_cast<uint8_t>(bits);
        high[value] = static_cast<uint8_t>(bits >> 8);
      }
    }
  }
};
constexpr SmallIntegers kSmallIntegers;

template <>
struct MultiplyAdd<BFloat16> {
  static constexpr int kDepth = 2;
  static constexpr int64_t kBlockBytes = int64_t{1} << 40;  // no limit: from the second-level cache it is as fast
  using Operand = __m512bh;
  using Element = BFloat16;
  static inline Operand strip(const BFloat16* p) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p)); }
  static inline void store_strip(BFloat16* p, Operand strip) {
    _mm512_storeu_si512(p, reinterpret_cast<__m512i>(strip));
  }
  static inline Operand inputs(const BFloat16* p) {
    int pair;
    std::memcpy(&pair, p, sizeof(pair));
    return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
  }
  static inline Vec apply(Operand weights, Operand inputs, Vec sum) { return _mm512_dpbf16_ps(sum, weights, inputs); }
};

template <>
struct WeightStep<BFloat16, BFloat16> {
  static constexpr int kDepth = 2;
  static inline int64_t index(int64_t lane, int64_t k) { return lane * kDepth + k; }
  template <int kTurn, int kVecs>
  static inline void load_turn(const BFloat16* p, __m512bh (&operands)[kVecs]) {
    for (int v = 0; v < kVecs; ++v) operands[v] = MultiplyAdd<BFloat16>::strip(p + v * kLanes * kDepth);
  }
};

template <>
struct WeightStep<BFloat16, int8_t> {
  static constexpr int kDepth = 2;
  // Each quarter of a register holds four features of either strip, since that is what unpacking separates.
  static inline int64_t index(int64_t lane, int64_t k) {
    return lane % kLanes / 4 * 16 + lane / kLanes * 8 + lane % 4 * 2 + k;
  }
  // Sign and magnitude become bfloat16 by two look-ups, each in a table of two registers that bits 0 to 6 index.
  template <int kTurn>
  static inline void load_turn(const int8_t* p, __m512bh (&strips)[kStrips]) {
    const __m512i stored = _mm512_loadu_si512(p);
    const __m512i low = look_up(kSmallIntegers.low, stored), high = look_up(kSmallIntegers.high, stored);
    const __m512i sign = _mm512_and_si512(stored, _mm512_set1_epi8(-128)), signed_high = _mm512_or_si512(high, sign);
    strips[0] = reinterpret_cast<__m512bh>(_mm512_unpacklo_epi8(low, signed_high));
    strips[1] = reinterpret_cast<__m512bh>(_mm512_unpackhi_epi8(low, signed_high));
  }
  static inline int8_t encode(int8_t value) { return static_cast<int8_t>(value < 0 ? -128 - value : value); }
  static inline int8_t decode(int8_t stored) { return encode(stored); }

 private:
  static inline __m512i look_up(const uint8_t* table, __m512i index) {
    return _mm512_permutex2var_epi8(_mm512_load_si512(table), index, _mm512_load_si512(table + 64));
  }
};

}  // namespace avx512_bf16
}  // namespace llm2_fast
#include "kernels_of_tier.h"
