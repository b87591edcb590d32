// Arguments of the kinds that the bindings share.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "llm2_fast/dtype.h"
#include "llm2_fast/isa.h"
#include "tensor_argument.h"

namespace llm2_fast {

using OptionalIsa = std::optional<std::string>;

inline Isa chosen_isa(const OptionalIsa& isa) {
  return isa.has_value() ? parse_isa("isa", *isa) : active_isa();
}

inline DType float_dtype(const TensorArgument& tensor) {
  return tensor.dtype() == "float32" ? DType::kFloat32 : DType::kBFloat16;
}

// A [B] argument.
class VectorArgument : public TensorArgument {
 public:
  VectorArgument(const char* name, pybind11::handle capsule, const char* dtype, int64_t size,
                 Access access = Access::kRead)
      : TensorArgument(name, capsule, {dtype}, 1, access) {
    require_shape({size}).require_contiguous();
  }
};

// A [B, K] argument.
class MatrixArgument : public TensorArgument {
 public:
  MatrixArgument(const char* name, pybind11::handle capsule, const char* dtype, int64_t rows, int64_t columns,
                 Access access = Access::kRead)
      : TensorArgument(name, capsule, {dtype}, 2, access) {
    require_shape({rows, columns});
    if (access == Access::kWrite) require_contiguous();
  }
};

// A [B, K] argument that may be None, which reads as null.
class OptionalMatrixArgument {
 public:
  OptionalMatrixArgument(const char* name, pybind11::handle capsule, const char* dtype, int64_t rows, int64_t columns) {
    if (!capsule.is_none()) tensor_.emplace(name, capsule, dtype, rows, columns);
  }
  template <typename T>
  T* data() const {
    return tensor_.has_value() ? tensor_->data<T>() : nullptr;
  }
  int64_t stride(int dimension) const { return tensor_.has_value() ? tensor_->stride(dimension) : 0; }

 private:
  std::optional<MatrixArgument> tensor_;
};

}  // namespace llm2_fast
