#include "tensor_argument.h"

#include <algorithm>

namespace llm2_fast {
namespace {

std::string dtype_name(DLDataType dtype) {
  const std::string bits = std::to_string(dtype.bits);
  std::string name = "DLPack type code " + std::to_string(dtype.code) + " with " + bits + " bits";
  if (dtype.code == kDLInt) name = "int" + bits;
  if (dtype.code == kDLUInt) name = "uint" + bits;
  if (dtype.code == kDLFloat) name = "float" + bits;
  if (dtype.code == kDLBfloat) name = "bfloat" + bits;
  if (dtype.code == kDLBool && dtype.bits == 8) name = "bool";
  return dtype.lanes == 1 ? name : name + " x " + std::to_string(dtype.lanes);
}

template <typename Range>
std::string join(const Range& items, const std::string& separator) {
  std::string text;
  for (const std::string& item : items) text += (text.empty() ? "" : separator) + item;
  return text;
}

template <typename Range>
std::string list(const Range& numbers) {
  std::vector<std::string> items;
  for (int64_t number : numbers) items.push_back(std::to_string(number));
  return "[" + join(items, ", ") + "]";
}

}  // namespace

TensorArgument::TensorArgument(std::string name, pybind11::handle capsule, std::initializer_list<const char*> dtypes,
                               int ndim, Access access)
    : name_(std::move(name)) {
  try {
    consume(capsule, access);
    if (std::find(dtypes.begin(), dtypes.end(), dtype_) == dtypes.end()) {
      throw argument_error(name_, join(std::vector<std::string>(dtypes.begin(), dtypes.end()), " or ") + " on the CPU",
                           dtype_);
    }
    if (shape_.size() != static_cast<size_t>(ndim)) {
      throw argument_error(name_, std::to_string(ndim) + " dimension" + (ndim == 1 ? "" : "s"),
                           "shape " + list(shape_));
    }
    if (shape_.back() > 1 && strides_.back() != 1) {
      throw argument_error(name_, "a contiguous last dimension", "strides " + list(strides_));
    }
  } catch (...) {
    if (release_) release_();  // a constructor that throws runs no destructor
    throw;
  }
}

TensorArgument::~TensorArgument() {
  if (release_) release_();
}

void TensorArgument::consume(pybind11::handle capsule, Access access) {
  PyObject* object = capsule.ptr();
  if (PyCapsule_IsValid(object, "dltensor")) {
    auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(object, "dltensor"));
    PyCapsule_SetName(object, "used_dltensor");
    release_ = [managed] {
      if (managed->deleter != nullptr) managed->deleter(managed);
    };
    read(managed->dl_tensor);
  } else if (PyCapsule_IsValid(object, "dltensor_versioned")) {
    auto* managed = static_cast<DLManagedTensorVersioned*>(PyCapsule_GetPointer(object, "dltensor_versioned"));
    PyCapsule_SetName(object, "used_dltensor_versioned");
    release_ = [managed] {
      if (managed->deleter != nullptr) managed->deleter(managed);
    };
    if (managed->version.major != 1) {
      throw argument_error(name_, "DLPack version 1", "version " + std::to_string(managed->version.major));
    }
    if (access == Access::kWrite && (managed->flags & DLPACK_FLAG_BITMASK_READ_ONLY) != 0) {
      throw argument_error(name_, "a tensor that can be written to", "a read-only one");
    }
    read(managed->dl_tensor);
  } else {
    throw argument_error(name_, "an unused DLPack capsule", Py_TYPE(object)->tp_name);
  }
}

void TensorArgument::read(const DLTensor& tensor) {
  if (tensor.device.device_type != kDLCPU) {
    throw argument_error(name_, "a tensor on the CPU",
                         "DLPack device type " + std::to_string(tensor.device.device_type));
  }
  dtype_ = dtype_name(tensor.dtype);
  shape_.assign(tensor.shape, tensor.shape + tensor.ndim);
  if (tensor.strides != nullptr) {
    strides_.assign(tensor.strides, tensor.strides + tensor.ndim);
  } else {
    strides_.assign(shape_.size(), 1);
    for (size_t i = shape_.size(); i-- > 1;) strides_[i - 1] = strides_[i] * shape_[i];
  }
  if (tensor.data != nullptr) data_ = static_cast<char*>(tensor.data) + tensor.byte_offset;
}

const TensorArgument& TensorArgument::require_shape(std::initializer_list<int64_t> shape) const {
  if (!std::equal(shape.begin(), shape.end(), shape_.begin(), shape_.end())) {
    throw argument_error(name_, "shape " + list(shape), "shape " + list(shape_));
  }
  return *this;
}

const TensorArgument& TensorArgument::require_contiguous() const {
  int64_t expected = 1;
  for (size_t i = shape_.size(); i-- > 0;) {
    // The stride of a dimension without a second element is never used.
    if (shape_[i] == 0) return *this;
    if (shape_[i] > 1 && strides_[i] != expected)
      throw argument_error(name_, "contiguous", "strides " + list(strides_));
    expected *= shape_[i];
  }
  return *this;
}

}  // namespace llm2_fast
