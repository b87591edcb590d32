// Checks of what comes through the C API: structs, pointers and sizes. They throw std::invalid_argument.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "llm2_fast/checks.h"
#include "llm2_fast/llm2_fast.h"
#include "llm2_fast/ops.h"

namespace llm2_fast {

// The caller's struct as this version knows it; what an older version of the struct lacks is zero. Structs may only
// grow at their end, and must not end in padding, which would be taken for the next field.
template <typename Struct>
Struct read_struct(const std::string& name, const Struct* given) {
  constexpr size_t kImpossible = 4096;  // bytes; more is not a size but an uninitialized struct
  if (given == nullptr) throw argument_error(name, "a struct", "NULL");
  const size_t size = given->struct_size;
  if (size < sizeof(size) || size > kImpossible) {
    throw argument_error(name + ".struct_size", "the size of the struct", std::to_string(size));
  }
  const auto* bytes = reinterpret_cast<const unsigned char*>(given);
  for (size_t i = sizeof(Struct); i < size; ++i) {
    if (bytes[i] != 0) {
      throw argument_error(name + ".struct_size", "at most " + std::to_string(sizeof(Struct)) + " in this version",
                           std::to_string(size) + " with fields set beyond that");
    }
  }
  Struct known = {};
  std::memcpy(&known, given, std::min(size, sizeof(Struct)));
  return known;
}

inline void require_at_most(const std::string& name, int64_t value, int64_t maximum) {
  if (value > maximum) throw argument_error(name, "<= " + std::to_string(maximum), std::to_string(value));
}

// A size or number that indices of 32 bits can count to.
inline void require_size(const std::string& name, int64_t value, int64_t minimum) {
  require_at_least(name, value, minimum);
  require_at_most(name, value, INT32_MAX);
}

inline void require_positive(const std::string& name, float value) {
  if (!(value > 0.0f && value <= FLT_MAX)) throw argument_error(name, "a positive number", std::to_string(value));
}

// Not null and aligned, unless it leads to nothing.
template <typename T>
void require_pointer(const std::string& name, const T* pointer, int64_t count, size_t alignment = alignof(T)) {
  if (count == 0) return;
  if (pointer == nullptr) throw argument_error(name, "a pointer", "NULL");
  if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0) {
    throw argument_error(name, "a pointer aligned to " + std::to_string(alignment) + " bytes", "another");
  }
}

template <typename T>
void require_null(const std::string& name, const T* pointer) {
  if (pointer != nullptr) throw argument_error(name, "NULL, since the step provides it", "a pointer");
}

// Of a dimension with `count` elements, which are at least `minimum` apart.
inline void require_stride(const std::string& name, int64_t stride, int64_t minimum, int64_t count) {
  if (count > 1) require_at_least(name, stride, minimum);
}

inline void require_stride_or_zero(const std::string& name, int64_t stride, int64_t minimum, int64_t count) {
  if (stride != 0) require_stride(name, stride, minimum, count);
}

// Where the arrays lie that arguments point to. The ops on the CPU do not know float16.
enum class Device { kCpu, kCuda };

DType read_dtype(const std::string& name, llm2_fast_dtype dtype, Device device = Device::kCpu);

// Options and outputs of a selection, without what describes the logits.
SelectCandidatesArgs read_selection(const llm2_fast_select_candidates_args& args);

// Options and outputs of a pick, without what describes the candidates.
AdjustAndPickArgs read_pick(const llm2_fast_adjust_and_pick_args& args);

// All arguments of an op.
SelectCandidatesArgs read_args(const llm2_fast_select_candidates_args& args, Device device);
AdjustAndPickArgs read_args(const llm2_fast_adjust_and_pick_args& args);
BranchAttentionArgs read_args(const llm2_fast_branch_attention_args& args);
CommitArgs read_args(const llm2_fast_commit_args& args, Device device);

}  // namespace llm2_fast
