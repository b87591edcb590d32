// How weights of linear layers lie in memory, and their quantization to int8.
//
// Weights are packed in panels of kStrips * kLanes output features, [depth / kDepth, kStrips, kLanes, kDepth] each: a
// matrix is one stream of memory. kDepth, and how a tier orders the weights of a step otherwise, are in multiply_add.h.
//
// int8 weights are the q of w = scale * q. The scale is max |w| / 127 over a group of inputs of an output feature, q is
// w / scale to nearest, ties to even. The definition in torch is llm2_fast/models/quantization.py.
#pragma once

#include <float.h>
#include <math.h>

#include <cstdint>

#include "kernels.h"
#include "multiply_add.h"

namespace llm2_fast {
namespace LLM2_FAST_TIER {

constexpr float kLargestInt8 = 127.0f;  // not -128: the range is symmetric

static PanelShape panel_shape(DType dtype) {
  return {kPanelWidth, kLanes,
          dtype == DType::kFloat32 ? StepOf<float, float>::kDepth : StepOf<BFloat16, BFloat16>::kDepth};
}

// Where the weight of output feature `row` and input feature k lies among the packed ones.
template <typename Step>
static inline int64_t packed_index(int64_t row, int64_t k, int64_t depth) {
  const int64_t first = row / kPanelWidth * depth + k / Step::kDepth * Step::kDepth;
  return first * kPanelWidth + Step::index(row % kPanelWidth, k % Step::kDepth);
}

static inline int64_t scale_index(int64_t row, int64_t group, int64_t num_groups) {
  return (row / kPanelWidth * num_groups + group) * kPanelWidth + row % kPanelWidth;
}

// NaN if one of the weights is not finite.
template <typename T>
static float largest_magnitude(const T* weights, int64_t size) {
  float largest = 0.0f;
  for (int64_t k = 0; k < size; ++k) {
    const float magnitude = fabsf(to_float(weights[k]));
    if (!(magnitude <= FLT_MAX)) return __builtin_nanf("");
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

// The scale may be subnormal, and then so inaccurate that the quotient exceeds 127.
static inline int8_t quantize(float weight, float scale) {
  const float quotient = rintf(weight / scale);
  const float magnitude = fabsf(quotient) < kLargestInt8 ? fabsf(quotient) : kLargestInt8;
  return static_cast<int8_t>(copysignf(magnitude, quotient));
}

template <typename T>
static void quantize_row(const PackArgs& args, int64_t row, const T* weights) {
  using Step = StepOf<T, int8_t>;
  int8_t* packed = static_cast<int8_t*>(args.packed);
  const int64_t groups = num_groups(args.depth, args.group_size);
  for (int64_t begin = 0; begin < args.in_features; begin += args.group_size) {
    const int64_t rest = args.in_features - begin, end = begin + (rest < args.group_size ? rest : args.group_size);
    const float scale = largest_magnitude(weights + begin, end - begin) / kLargestInt8;
    args.scales[scale_index(row, begin / args.group_size, groups)] = scale;
    if (!(scale > 0.0f)) continue;  // the packed memory is zero
    for (int64_t k = begin; k < end; ++k) {
      const int8_t value = quantize(to_float(weights[k]), scale);
      packed[packed_index<Step>(row, k, args.depth)] = Step::encode(value);
    }
  }
}

template <typename T>
static void pack_panels_of(const PackArgs& args, RowRange panels) {
  using Step = StepOf<T, T>;
  T* packed = static_cast<T*>(args.packed);
  for (int64_t row = panels.begin * kPanelWidth; row < panels.end * kPanelWidth; ++row) {
    const T* weights = static_cast<const T*>(args.rows[row]);
    if (weights == nullptr) continue;  // the packed memory is zero
    if (args.scales != nullptr) {
      quantize_row(args, row, weights);
      continue;
    }
    for (int64_t k = 0; k < args.in_features; ++k) packed[packed_index<Step>(row, k, args.depth)] = weights[k];
  }
}

static void pack_panels(const PackArgs& args, RowRange panels) {
  args.dtype == DType::kFloat32 ? pack_panels_of<float>(args, panels) : pack_panels_of<BFloat16>(args, panels);
}

template <typename T>
static void unpack_row_of(const PackedPanels& panels, int64_t row, int64_t size, float* output) {
  if (panels.scales == nullptr) {
    const T* packed = static_cast<const T*>(panels.packed);
    for (int64_t k = 0; k < size; ++k) output[k] = to_float(packed[packed_index<StepOf<T, T>>(row, k, panels.depth)]);
    return;
  }
  using Step = StepOf<T, int8_t>;
  const int8_t* packed = static_cast<const int8_t*>(panels.packed);
  const int64_t groups = num_groups(panels.depth, panels.group_size);
  for (int64_t k = 0; k < size; ++k) {
    const int8_t value = Step::decode(packed[packed_index<Step>(row, k, panels.depth)]);
    output[k] = static_cast<float>(value) * panels.scales[scale_index(row, k / panels.group_size, groups)];
  }
}

static void unpack_row(DType dtype, const PackedPanels& panels, int64_t row, int64_t size, float* output) {
  dtype == DType::kFloat32 ? unpack_row_of<float>(panels, row, size, output)
                           : unpack_row_of<BFloat16>(panels, row, size, output);
}

}  // namespace LLM2_FAST_TIER
}  // namespace llm2_fast
