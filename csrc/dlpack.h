// The parts of the DLPack ABI that are needed to receive tensors and to hand out vectors
// (https://dmlc.github.io/dlpack).
//
// Two kinds of capsule exist: "dltensor" holds a DLManagedTensor, "dltensor_versioned" a DLManagedTensorVersioned. Who
// consumes one renames the capsule to "used_..." and calls the deleter when done.
#pragma once

#include <cstdint>

extern "C" {

struct DLDevice {
  int32_t device_type;  // kDLCPU = 1
  int32_t device_id;
};

struct DLDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

enum DLDataTypeCode : uint8_t { kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4, kDLBool = 6 };
enum DLDeviceType : int32_t { kDLCPU = 1 };

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null for a compact row-major tensor
  uint64_t byte_offset;
};

struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor* self);
};

struct DLPackVersion {
  uint32_t major;
  uint32_t minor;
};

constexpr uint64_t DLPACK_FLAG_BITMASK_READ_ONLY = 1;

struct DLManagedTensorVersioned {
  DLPackVersion version;  // the layout below holds for major version 1
  void* manager_ctx;
  void (*deleter)(DLManagedTensorVersioned* self);
  uint64_t flags;
  DLTensor dl_tensor;
};

}  // extern "C"
