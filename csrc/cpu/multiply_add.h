// The inner product step of `linear` for inputs of type T and weights of type T or int8, in terms of a tier's Vec.
#pragma once

#include "llm2_fast/dtype.h"

namespace llm2_fast {
namespace LLM2_FAST_TIER {

constexpr int kStrips = 2;
constexpr int kPanelWidth = kStrips * kLanes;

// Asks for a line for the second-level cache, which can wait for more of them at once than the first.
static inline void prefetch(const void* address) {
  __builtin_prefetch(address, 0, 2);
}

// Adds kDepth products of weights and inputs to each lane of a sum.
template <typename T>
struct MultiplyAdd {
  static constexpr int kDepth = 1;
  using Operand = Vec;
  // What T is kept as where it is an operand many times: `MultiplyAdd<Element>` multiplies the same numbers.
  using Element = float;
  // kLanes operands at p as the bits of `Element`s, or n < kLanes * kDepth elements and zeros.
  static inline Vec elements(const T* p) { return load(p); }
  static inline Vec elements(const T* p, int n) { return load_partial(p, n, 0.0f); }
  // kLanes operands.
  static inline Operand strip(const T* p) { return load(p); }
  // [kStrips, kLanes, kDepth] weights, T or int8.
  template <typename Weight>
  static inline void weights(const Weight* p, Operand* strips) {
    for (int s = 0; s < kStrips; ++s) strips[s] = load(p + s * kLanes);
  }
  static inline void store_strip(Element* p, Operand strip) { store(p, strip); }
  // [kDepth] inputs, the same for all lanes.
  static inline Operand inputs(const T* p) { return set1(to_float(*p)); }
  static inline Vec apply(Operand weights, Operand inputs, Vec sum) { return fma(weights, inputs, sum); }

  // How int8 weights are stored: where in a step that of an output feature and one of kDepth inputs lies, and as what.
  static inline int64_t int8_offset(int64_t lane, int64_t k) { return lane * kDepth + k; }
  static inline int8_t encode(int8_t value) { return value; }
  static inline int8_t decode(int8_t stored) { return stored; }
};

}  // namespace LLM2_FAST_TIER
}  // namespace llm2_fast
