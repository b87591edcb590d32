// The kernels of one instruction-set tier, as a table. Each kernels_<tier>.cpp defines one.
#pragma once

#include <cstdint>

#include "llm2_fast/ops.h"

namespace llm2_fast {

// Kernels take working memory from the caller: `workspace` is aligned for any type, holds at least the bytes that the
// functions below ask for, and belongs to one call at a time. It need not be initialized.
struct KernelTable {
  void (*select_candidates)(const SelectCandidatesArgs& args, RowRange rows);
  void (*adjust_and_pick)(const AdjustAndPickArgs& args, RowRange rows, void* workspace);
  void (*branch_attention)(const BranchAttentionArgs& args, RowRange rows, void* workspace);
  int64_t (*adjust_and_pick_workspace)(const AdjustAndPickArgs& args);
  int64_t (*branch_attention_workspace)(const BranchAttentionArgs& args);
};

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
#endif

}  // namespace llm2_fast
