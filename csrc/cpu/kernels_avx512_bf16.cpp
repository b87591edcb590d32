// AVX-512 with dot products of bfloat16: two products per lane, summed in float32.
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

template <>
struct MultiplyAdd<BFloat16> {
  static constexpr int kDepth = 2;
  using Operand = __m512bh;
  static inline Operand weights(const BFloat16* p) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p)); }
  static inline Operand inputs(const BFloat16* p) {
    int pair;
    std::memcpy(&pair, p, sizeof(pair));
    return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
  }
  static inline Vec apply(Operand weights, Operand inputs, Vec sum) { return _mm512_dpbf16_ps(sum, weights, inputs); }
};

}  // namespace avx512_bf16
}  // namespace llm2_fast
#include "kernels_of_tier.h"
