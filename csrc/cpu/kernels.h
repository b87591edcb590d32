// The kernels of one instruction-set tier, as a table. Each kernels_<tier>.cpp defines one.
#pragma once

#include <cstdint>

#include "llm2_fast/ops.h"

namespace llm2_fast {

// How a tier packs the weights of a linear layer, see packing.h.
struct PanelShape {
  int64_t width;  // output features per panel
  int64_t lanes;  // output features per strip
  int64_t depth;  // input features per multiply-add; the packed depth is a multiple of it
};

// Packed weights: of the dtype, or int8 that are multiplied by scales.
struct PackedPanels {
  const void* packed;   // [num_panels * width * depth]
  int64_t depth;        // in_features, padded
  const float* scales;  // [num_panels, num_groups, width], or null
  int64_t group_size;   // input features that share a scale; the last group may be smaller
};

static inline int64_t num_groups(int64_t depth, int64_t group_size) {
  return (depth + group_size - 1) / group_size;
}

struct PackArgs {
  DType dtype;              // of the rows, and of weights without scales
  const void* const* rows;  // [num_panels * width]: weights of an output feature, [in_features], or null for padding
  int64_t in_features;
  int64_t depth;  // in_features, padded
  void* packed;   // [num_panels * width * depth], zero
  float* scales;  // [num_panels, num_groups, width], zero, or null
  int64_t group_size;
};

// Rows [rows, depth] that a linear layer reads, zeros in the padding.
struct LinearInput {
  const void* rows;
  int64_t stride;  // elements
};

// One product W x.
struct LinearTerm {
  PackedPanels panels;
  LinearInput input;  // as `operands` made it
};

enum class Epilogue {
  kStore,        // output, of the dtype, = y
  kStoreFloat,   // output, float32, = y
  kAdd,          // output, float32, += y
  kSiluMul,      // output, of the dtype, = silu(gate) * up; the strips of a panel are gate and up
  kGeluTanhMul,  // output, of the dtype, = gelu_tanh(gate) * up, likewise
  kSelect,       // y are logits, which `select` takes in
};

// Whether the strips of a panel are gate and up.
static inline bool is_gated(Epilogue epilogue) {
  return epilogue == Epilogue::kSiluMul || epilogue == Epilogue::kGeluTanhMul;
}

// The first entries in rank of one row of logits, as one thread meets them: at most `capacity` of those it was shown.
struct LogitRanking {
  float* logits;  // [capacity]
  int32_t* ids;   // [capacity]
  int64_t size;
  float max;  // of the logits it was shown
};

// Selection of candidates while the logits are computed, so that nothing needs to write and read all of them.
struct SelectFold {
  const SelectCandidatesArgs* args;  // options and outputs; `logits` is not read
  int64_t capacity;                  // of the rankings: one more than can be chosen, which tells whether more were
  LogitRanking* rankings;            // [num_threads, rows]
  float* panel_max;                  // [rows, num_panels]
  float* panel_sum;                  // [rows, num_panels], of exp(logit - panel_max)
  int64_t num_panels;
  float* const* logits;  // [rows], where to write the logits [out_features] of a row, or null
};

// The product with the packed weights, plus a low-rank update's for the rows from `first_updated` on.
struct LinearArgs {
  DType dtype;  // of the inputs, before they became operands, and of weights without scales
  LinearTerm weights;
  LinearTerm update;  // `panels.packed` is null if there is none
  int64_t first_updated;
  int64_t rows;
  int64_t out_features;  // of the output, half of y's if gated
  const float* bias;     // [num_panels * width] or null
  Epilogue epilogue;
  void* output;  // [rows, out_features]; not read with kSelect
  int64_t output_stride;
  const SelectFold* select;  // with kSelect
  LogitRanking* rankings;    // [rows], of the calling thread, with kSelect
  void* workspace;           // `linear_workspace` bytes, of the calling thread; more for fewer rows will do
};

// Queries and keys get their norm, if there is one, and their rotary position; values are converted only. Key/value
// head h comes with the query heads that attend to it.
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

struct PrefixStream;  // see prefix_stream.h

// Kernels take working memory from the caller: `workspace` is aligned for any type, holds at least the bytes that the
// functions below ask for, and belongs to one call at a time. It need not be initialized.
struct KernelTable {
  void (*select_candidates)(const SelectCandidatesArgs& args, RowRange rows);
  void (*adjust_and_pick)(const AdjustAndPickArgs& args, RowRange rows, void* workspace);
  void (*branch_attention)(const BranchAttentionArgs& args, RowRange rows, RowRange kv_heads, PrefixStream* ahead,
                           void* workspace);
  // The same for one tile of rows and one head in parts: first any part of the prefix, each into a state of its own of
  // `attention_state_size` floats, then all of them together, in order. `rows` are at most kAttentionTileRows of one
  // sequence whose visible positions touch.
  void (*attend_part)(const BranchAttentionArgs& args, RowRange rows, int64_t kv_head, int64_t part, float* state,
                      PrefixStream* ahead, void* workspace);
  void (*merge_parts)(const BranchAttentionArgs& args, RowRange rows, int64_t kv_head, int64_t num_parts, float* states,
                      void* workspace);
  int64_t (*attention_state_size)(const BranchAttentionArgs& args);
  int64_t (*adjust_and_pick_workspace)(const AdjustAndPickArgs& args);
  int64_t (*branch_attention_workspace)(const BranchAttentionArgs& args);

  PanelShape (*panel_shape)(DType dtype);
  // Weights that are to have scales are quantized. The scale of a group with a weight that is not finite is NaN.
  void (*pack_panels)(const PackArgs& args, RowRange panels);
  // Weights [size] of one output feature, as float32.
  void (*unpack_row)(DType dtype, const PackedPanels& panels, int64_t row, int64_t size, float* output);
  void (*linear)(const LinearArgs& args, RowRange panels);
  int64_t (*linear_workspace)(DType dtype, const PackedPanels& panels, int64_t rows);
  // The input of `linear`, of the dtype, as what the tier multiplies: copies in `buffer`, of `operands_size` bytes, or
  // if there are none of these the same rows.
  LinearInput (*operands)(DType dtype, const LinearInput& input, int64_t rows, int64_t depth, void* buffer);
  int64_t (*operands_size)(DType dtype, int64_t rows, int64_t depth);
  // Writes the outputs of a selection whose panels have all been folded.
  void (*finish_selection)(const SelectFold& select, int num_threads, int64_t rows, RowRange range);
  // output = weight * x / sqrt(mean(x^2) + eps), [size].
  void (*rms_norm)(DType dtype, const float* x, const float* weight, int64_t size, float eps, void* output);
  void (*rope)(const RopeArgs& args, RowRange rows, RowRange kv_heads);
  float (*dot)(const float* x, const float* y, int64_t size);
};

constexpr int64_t kAttentionTileRows = 16;
constexpr int64_t kCacheLine = 64;

// Asks for a line for the second-level cache, which can wait for more of them at once than the first. As a call GCC
// would take it for one without effects and leave it out.
static inline __attribute__((always_inline)) void prefetch(const void* address) {
  __builtin_prefetch(address, 0, 2);
}

constexpr int64_t kAttentionPart = 256;  // positions; a part of the prefix begins at a multiple

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
