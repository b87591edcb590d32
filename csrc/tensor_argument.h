// A tensor argument of a Python call: takes over a DLPack capsule and checks what is in it. The std::invalid_argument
// of a failed check becomes ValueError in Python.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <string>
#include <vector>

#include "dlpack.h"
#include "llm2_fast/checks.h"

namespace llm2_fast {

enum class Access { kRead, kWrite };

class TensorArgument {
 public:
  // Consumes `capsule`; the tensor stays alive as long as this object. Throws std::invalid_argument unless it holds a
  // tensor on the CPU with `ndim` dimensions, the last of them contiguous, of one of `dtypes`, torch's names of them.
  TensorArgument(std::string name, pybind11::handle capsule, std::initializer_list<const char*> dtypes, int ndim,
                 Access access = Access::kRead);
  ~TensorArgument();
  TensorArgument(const TensorArgument&) = delete;
  TensorArgument& operator=(const TensorArgument&) = delete;

  // Throws std::invalid_argument unless the sizes are `shape`.
  const TensorArgument& require_shape(std::initializer_list<int64_t> shape) const;
  // Throws std::invalid_argument unless the elements are compact and in row-major order.
  const TensorArgument& require_contiguous() const;

  const std::string& name() const { return name_; }
  const std::string& dtype() const { return dtype_; }
  int64_t size(int dimension) const { return shape_[static_cast<size_t>(dimension)]; }
  int64_t stride(int dimension) const { return strides_[static_cast<size_t>(dimension)]; }

  template <typename T>
  T* data() const {
    return static_cast<T*>(data_);
  }

 private:
  void consume(pybind11::handle capsule, Access access);
  void read(const DLTensor& tensor);

  std::string name_;
  std::string dtype_;
  void* data_ = nullptr;
  std::vector<int64_t> shape_;
  std::vector<int64_t> strides_;
  std::function<void()> release_;
};

}  // namespace llm2_fast
