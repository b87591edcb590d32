// Element types of the ops. Arithmetic is always float32; the other types are storage only.
#pragma once

#include <cstdint>
#include <cstring>

// Of functions that kernels on the GPU use, too.
#ifdef __CUDACC__
#define LLM2_FAST_HOST_DEVICE __host__ __device__
#else
#define LLM2_FAST_HOST_DEVICE
#endif

namespace llm2_fast {

enum class DType {
  kFloat32,
  kBFloat16,
  kFloat16,  // of the ops on the GPU only
  kInt8      // of quantized weights only
};

// The upper half of a float32.
struct BFloat16 {
  uint16_t bits;
};

// Bytes of an element.
constexpr int64_t size_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : dtype == DType::kInt8 ? 1 : 2;
}

// `static inline` everywhere in the headers that kernels include: each translation unit keeps its own copy, so the
// linker can never put a copy compiled for AVX-512 into the portable path.

static inline float to_float(float value) {
  return value;
}

static inline float to_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

static inline void from_float(float value, float* result) {
  *result = value;
}

// Rounds to nearest, ties to even. NaN stays NaN: rounding alone could carry its mantissa into infinity.
static inline void from_float(float value, BFloat16* result) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = is_nan ? (bits | 0x00400000u) : bits + 0x7fffu + ((bits >> 16) & 1u);
  result->bits = static_cast<uint16_t>(rounded >> 16);
}

}  // namespace llm2_fast
