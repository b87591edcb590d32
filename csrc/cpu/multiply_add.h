// The inner product step of `linear` and of attention, in terms of a tier's Vec.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace llm2_fast {
namespace LLM2_FAST_TIER {

constexpr int kStrips = 2;
constexpr int kPanelWidth = kStrips * kLanes;

// Adds kDepth products of operands of type T to each lane of a sum.
template <typename T>
struct MultiplyAdd {
  static constexpr int kDepth = 1;
  static constexpr int64_t kBlockBytes = 16384;  // of operands that are to stay in the first-level cache, in `linear`
  using Operand = Vec;
  // What T is kept as where it is an operand many times: `MultiplyAdd<Element>` multiplies the same numbers.
  using Element = float;
  static inline void store_strip(Element* p, Operand strip) { store(p, strip); }
  // [kDepth] inputs, the same for all lanes.
  static inline Operand inputs(const T* p) { return set1(to_float(*p)); }
  static inline Vec apply(Operand weights, Operand inputs, Vec sum) { return fma(weights, inputs, sum); }
};

// How weights of type Weight, or keys, lie in memory where they are multiplied with inputs that are kept as `Element`s.
// A step has those of kDepth inputs for each of some lanes, and they become operands in as many turns as these inputs.
template <typename Element, typename Weight>
struct WeightStep {
  static constexpr int kDepth = 1;
  // Where in a step the weight of an output feature and one of kDepth inputs lies.
  static inline int64_t index(int64_t lane, int64_t k) { return lane * kDepth + k; }
  template <int kTurn, int kVecs>
  static inline void load_turn(const Weight* p, Vec (&operands)[kVecs]) {
    for (int v = 0; v < kVecs; ++v) operands[v] = load(p + v * kLanes);
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
  template <int kTurn, int kVecs>
  static inline void load_turn(const BFloat16* p, Vec (&operands)[kVecs]) {
    for (int v = 0; v < kVecs; ++v) {
      const BFloat16* pairs = p + v * kLanes * kDepth;
      operands[v] = kTurn == 0 ? load_first_of_pairs(pairs) : load_second_of_pairs(pairs);
    }
  }
};

// Of weights that are multiplied with inputs of type T.
template <typename T, typename Weight>
using StepOf = WeightStep<typename MultiplyAdd<T>::Element, Weight>;

// Adds the products of one turn of a step.
template <typename Element, int kTurn, typename Weight, int kRows, int kVecs>
static inline __attribute__((always_inline)) void add_turn(const Element* inputs, int64_t input_stride,
                                                           const Weight* weights, Vec (&sum)[kRows][kVecs]) {
  using Product = MultiplyAdd<Element>;
  typename Product::Operand operands[kVecs];
  WeightStep<Element, Weight>::template load_turn<kTurn>(weights, operands);
  for (int r = 0; r < kRows; ++r) {
    const typename Product::Operand input = Product::inputs(inputs + r * input_stride + kTurn * Product::kDepth);
    for (int v = 0; v < kVecs; ++v) sum[r][v] = Product::apply(operands[v], input, sum[r][v]);
  }
}

// Adds the products of the inputs of a step, of kRows rows, with kVecs vectors of its weights.
template <typename Element, typename Weight, int kRows, int kVecs>
static inline __attribute__((always_inline)) void add_step(const Element* inputs, int64_t input_stride,
                                                           const Weight* weights, Vec (&sum)[kRows][kVecs]) {
  add_turn<Element, 0>(inputs, input_stride, weights, sum);
  if constexpr (WeightStep<Element, Weight>::kDepth > MultiplyAdd<Element>::kDepth) {
    add_turn<Element, 1>(inputs, input_stride, weights, sum);
  }
}

// What `T`s are kept as where they are operands many times.
template <typename T>
static inline void to_elements(const T* from, int64_t size, T* to) {
  for (int64_t i = 0; i < size; ++i) to[i] = from[i];
}
static inline void to_elements(const BFloat16* from, int64_t size, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(to + i, load(from + i));
  for (; i < size; ++i) to[i] = to_float(from[i]);
}

}  // namespace LLM2_FAST_TIER
}  // namespace llm2_fast
