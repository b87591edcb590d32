// Chooses the kernels of a tier and gives them their working memory.
#include "llm2_fast/ops.h"

#include <memory>

#include "kernels.h"

namespace llm2_fast {
const KernelTable& kernels(Isa isa) {
#ifdef LLM2_FAST_X86
  if (isa == Isa::kAvx512Bf16) return avx512_bf16::kKernels;
  if (isa == Isa::kAvx512) return avx512::kKernels;
  if (isa == Isa::kAvx2) return avx2::kKernels;
#else
  static_cast<void>(isa);  // parse_isa knows one tier only
#endif
  return portable::kKernels;
}

namespace {

std::unique_ptr<unsigned char[]> allocate(int64_t bytes) {
  return std::unique_ptr<unsigned char[]>(new unsigned char[static_cast<size_t>(bytes)]);
}

}  // namespace

void select_candidates(const SelectCandidatesArgs& args, RowRange rows, Isa isa) {
  kernels(isa).select_candidates(args, rows);
}

void adjust_and_pick(const AdjustAndPickArgs& args, RowRange rows, Isa isa) {
  const KernelTable& table = kernels(isa);
  table.adjust_and_pick(args, rows, allocate(table.adjust_and_pick_workspace(args)).get());
}

void branch_attention(const BranchAttentionArgs& args, RowRange rows, Isa isa) {
  const KernelTable& table = kernels(isa);
  table.branch_attention(args, rows, {0, args.num_kv_heads}, allocate(table.branch_attention_workspace(args)).get());
}

}  // namespace llm2_fast
