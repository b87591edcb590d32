// The inner product step of `linear` for weights of type T, in terms of a tier's Vec.
#pragma once

#include "llm2_fast/dtype.h"

namespace llm2_fast {
namespace LLM2_FAST_TIER {

// Adds kDepth products of weights and inputs to each lane of a sum.
template <typename T>
struct MultiplyAdd {
  static constexpr int kDepth = 1;
  using Operand = Vec;
  // [kLanes, kDepth] weights.
  static inline Operand weights(const T* p) { return load(p); }
  // [kDepth] inputs, the same for all lanes.
  static inline Operand inputs(const T* p) { return set1(to_float(*p)); }
  static inline Vec apply(Operand weights, Operand inputs, Vec sum) { return fma(weights, inputs, sum); }
};

}  // namespace LLM2_FAST_TIER
}  // namespace llm2_fast
