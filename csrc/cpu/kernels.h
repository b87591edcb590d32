// The kernels of one instruction-set tier, as a table. Each kernels_<tier>.cpp defines one.
#pragma once

#include <cstdint>

#include "llm2_fast/ops.h"

namespace llm2_fast {

// How a tier packs the weights of a linear layer, see linear.h.
struct PanelShape {
  int64_t width;  // output features per panel
  int64_t lanes;  // output features per strip
  int64_t depth;  // input features per multiply-add; the packed depth is a multiple of it
};

struct PackArgs {
  DType dtype;
  const void* const* rows;  // [num_panels * width]: weights of an output feature, [in_features], or null for padding
  int64_t in_features;
  int64_t depth;  // in_features, padded
  void* packed;   // [num_panels * width * depth]
};

// One product W x.
struct LinearTerm {
  const void* packed;
  int64_t depth;      // padded
  const void* input;  // [rows, depth], zeros in the padding
  int64_t input_stride;
};

enum class Epilogue {
  kStore,       // output, of the dtype, = y
  kStoreFloat,  // output, float32, = y
  kAdd,         // output, float32, += y
  kSiluMul,     // output, of the dtype, = silu(gate) * up; the strips of a panel are gate and up
};

struct LinearArgs {
  DType dtype;  // of weights and inputs
  LinearTerm terms[2];
  int num_terms;
  int64_t rows;
  int64_t out_features;  // of the output, half of y's with kSiluMul
  const float* bias;     // [num_panels * width] or null
  Epilogue epilogue;
  void* output;  // [rows, out_features]
  int64_t output_stride;
};

// Queries and keys get their norm, if there is one, and their rotary position; values are converted only.
struct RopeArgs {
  DType dtype;  // of the outputs
  int64_t num_heads, num_kv_heads, head_dim;
  const float* qkv;     // [R, num_heads + 2 * num_kv_heads, head_dim]
  const float* angles;  // [R, 2, head_dim / 2], cosines and sines
  const float* q_norm;  // [head_dim] or null
  const float* k_norm;  // [head_dim] or null
  float eps;
  void* query;      // [R, num_heads, head_dim]
  void* own_key;    // [R, num_kv_heads, head_dim]
  void* own_value;  // [R, num_kv_heads, head_dim]
  float* scratch;   // [head_dim], of the calling thread
};

// Kernels take working memory from the caller: `workspace` is aligned for any type, holds at least the bytes that the
// functions below ask for, and belongs to one call at a time. It need not be initialized.
struct KernelTable {
  void (*select_candidates)(const SelectCandidatesArgs& args, RowRange rows);
  void (*adjust_and_pick)(const AdjustAndPickArgs& args, RowRange rows, void* workspace);
  void (*branch_attention)(const BranchAttentionArgs& args, RowRange rows, RowRange kv_heads, void* workspace);
  int64_t (*adjust_and_pick_workspace)(const AdjustAndPickArgs& args);
  int64_t (*branch_attention_workspace)(const BranchAttentionArgs& args);

  PanelShape (*panel_shape)(DType dtype);
  void (*pack_panels)(const PackArgs& args, RowRange panels);
  // Weights [size] of one output feature, as float32.
  void (*unpack_row)(DType dtype, const void* packed, int64_t row, int64_t depth, int64_t size, float* output);
  void (*linear)(const LinearArgs& args, RowRange panels);
  // output = weight * x / sqrt(mean(x^2) + eps), [size].
  void (*rms_norm)(DType dtype, const float* x, const float* weight, int64_t size, float eps, void* output);
  void (*rope)(const RopeArgs& args, RowRange rows);
  float (*dot)(const float* x, const float* y, int64_t size);
};

// The kernels of a tier that can run here.
const KernelTable& kernels(Isa isa);

namespace portable {
extern const KernelTable kKernels;
}
#ifdef LLM2_FAST_X86
namespace avx2 {
extern const KernelTable kKernels;
}
namespace avx512 {
extern const KernelTable kKernels;
}
namespace avx512_bf16 {
extern const KernelTable kKernels;
}
#endif

}  // namespace llm2_fast
