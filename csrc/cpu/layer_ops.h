// The small ops between a decoder layer's linear layers: root-mean-square norm, rotary positions, dot products.
#pragma once

#include <math.h>

#include <cstdint>

#include "kernels.h"
#include "vector_math.h"

namespace llm2_fast {
namespace LLM2_FAST_TIER {

// Sum of x[i] * y[i], in an order that is fixed.
static float dot(const float* x, const float* y, int64_t size) {
  Vec sum = set1(0.0f);
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) sum = fma(load(x + i), load(y + i), sum);
  if (i < size) {
    const int rest = static_cast<int>(size - i);
    sum = fma(load_partial(x + i, rest, 0.0f), load_partial(y + i, rest, 0.0f), sum);
  }
  return sum_lanes(sum);
}

template <typename T>
static void rms_norm_of(const float* x, const float* weight, int64_t size, float eps, T* output) {
  const float scale = 1.0f / sqrtf(dot(x, x, size) / static_cast<float>(size) + eps);
  for (int64_t i = 0; i < size; ++i) from_float(weight[i] * (x[i] * scale), output + i);
}

static void rms_norm(DType dtype, const float* x, const float* weight, int64_t size, float eps, void* output) {
  dtype == DType::kFloat32 ? rms_norm_of(x, weight, size, eps, static_cast<float*>(output))
                           : rms_norm_of(x, weight, size, eps, static_cast<BFloat16*>(output));
}

// Rotates the pairs (x[i], x[i + half]) by the angles whose cosines and sines are given.
template <typename T>
static void rotate(const float* x, const float* cosine, const float* sine, int64_t half, T* output) {
  for (int64_t i = 0; i < half; ++i) {
    from_float(x[i] * cosine[i] - x[i + half] * sine[i], output + i);
    from_float(x[i + half] * cosine[i] + x[i] * sine[i], output + i + half);
  }
}

// One head of a row: norm if there is one, then rotation.
template <typename T>
static void position_head(const RopeArgs& args, const float* head, const float* norm, const float* angles, T* output) {
  float* normed = args.scratch;
  if (norm != nullptr) {
    rms_norm_of(head, norm, args.head_dim, args.eps, normed);
    head = normed;
  }
  rotate(head, angles, angles + args.head_dim / 2, args.head_dim / 2, output);
}

template <typename T>
static void rope_row(const RopeArgs& args, int64_t row, RowRange kv_heads) {
  const int64_t dim = args.head_dim, group = args.num_heads / args.num_kv_heads;
  const float* angles = args.angles + row * dim;
  const float* queries = args.qkv + row * (args.num_heads + 2 * args.num_kv_heads) * dim;
  const float* keys = queries + args.num_heads * dim;
  const float* values = keys + args.num_kv_heads * dim;
  T* query = static_cast<T*>(args.query) + row * args.num_heads * dim;
  for (int64_t h = kv_heads.begin * group; h < kv_heads.end * group; ++h) {
    position_head(args, queries + h * dim, args.q_norm, angles, query + h * dim);
  }
  T* key = static_cast<T*>(args.own_key) + row * args.num_kv_heads * dim;
  T* value = static_cast<T*>(args.own_value) + row * args.num_kv_heads * dim;
  for (int64_t h = kv_heads.begin; h < kv_heads.end; ++h) {
    position_head(args, keys + h * dim, args.k_norm, angles, key + h * dim);
  }
  for (int64_t i = kv_heads.begin * dim; i < kv_heads.end * dim; ++i) from_float(values[i], value + i);
}

static void rope(const RopeArgs& args, RowRange rows, RowRange kv_heads) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    args.dtype == DType::kFloat32 ? rope_row<float>(args, row, kv_heads) : rope_row<BFloat16>(args, row, kv_heads);
  }
}

}  // namespace LLM2_FAST_TIER
}  // namespace llm2_fast
