// The inner product step of `linear` and of attention, in terms of a tier's Vec.
#pragma once

#include <cstdint>

#include "llm2_fast/dtype.h"

namespace llm2_fast {
namespace LLM2_FAST_TIER {

constexpr int kStrips = 2;
constexpr int kPanelWidth = kStrips * kLanes;

// Asks for a line for the second-level cache, which can wait for more of them at once than the first.
static inline void prefetch(const void* address) {
  __builtin_prefetch(address, 0, 2);
}

// Adds kDepth products of operands of type T to each lane of a sum.
template <typename T>
struct MultiplyAdd {
  static constexpr int kDepth = 1;
  static constexpr int64_t kBlockBytes = 16384;  // of operands that are to stay in the first-level cache, in `linear`
  using Operand = Vec;
  // What T is kept as where it is an operand many times: `MultiplyAdd<Element>` multiplies the same numbers.
  using Element = float;
  // kLanes operands at p as the bits of `Element`s, or n < kLanes * kDepth elements and zeros.
  static inline Vec elements(const T* p) { return load(p); }
  static inline Vec elements(const T* p, int n) { return load_partial(p, n, 0.0f); }
  // kLanes operands.
  static inline Operand strip(const T* p) { return load(p); }
  static inline void store_strip(Element* p, Operand strip) { store(p, strip); }
  // [kDepth] inputs, the same for all lanes.
  static inline Operand inputs(const T* p) { return set1(to_float(*p)); }
  static inline Vec apply(Operand weights, Operand inputs, Vec sum) { return fma(weights, inputs, sum); }
};

// How weights of type Weight are packed where `linear` multiplies them with inputs that are kept as `Element`s. A step
// of a panel has the weights of kDepth inputs, which become operands in as many turns as these inputs do.
template <typename Element, typename Weight>
struct WeightStep {
  static constexpr int kDepth = 1;
  // Where in a step the weight of an output feature and one of kDepth inputs lies.
  static inline int64_t index(int64_t lane, int64_t k) { return lane * kDepth + k; }
  template <int kTurn>
  static inline void load_turn(const Weight* p, Vec* strips) {
    for (int s = 0; s < kStrips; ++s) strips[s] = load(p + s * kLanes);
  }
  // How an int8 weight is stored.
  static inline int8_t encode(int8_t value) { return value; }
  static inline int8_t decode(int8_t stored) { return stored; }
};

// bfloat16 in pairs: a vector of memory has two for each lane, and widening takes one instruction.
template <>
struct WeightStep<float, BFloat16> {
  static constexpr int kDepth = 2;
  static inline int64_t index(int64_t lane, int64_t k) { return lane * kDepth + k; }
  template <int kTurn>
  static inline void load_turn(const BFloat16* p, Vec* strips) {
    for (int s = 0; s < kStrips; ++s) {
      const BFloat16* pairs = p + s * kLanes * kDepth;
      strips[s] = kTurn == 0 ? load_first_of_pairs(pairs) : load_second_of_pairs(pairs);
    }
  }
};

}  // namespace LLM2_FAST_TIER
}  // namespace llm2_fast
