// The ops that stacks without Python need on the GPU. Arguments, results and order are those of the functions of the
// same name in llm2_fast/ops.h, which also holds the structs; every pointer leads to device memory.
//
// Calls only queue kernels: they allocate nothing and wait for nothing, so a CUDA graph can hold them. `stream` is a
// cudaStream_t. What a row gives depends on nothing but the row and the shapes. They throw std::runtime_error with
// CUDA's message if a kernel cannot be queued.
#pragma once

#include <cstdint>

#include "llm2_fast/ops.h"

namespace llm2_fast {
namespace cuda {

constexpr int64_t kMaxCandidates = 1024;                  // of a selection
constexpr int64_t kMaxPickCandidates = int64_t{1} << 20;  // of a pick

// Bytes of working memory, aligned to 16, for a selection of `batch` rows. It need not be initialized.
int64_t select_candidates_workspace(const SelectCandidatesArgs& args, int64_t batch);

// Logits of all dtypes.
void select_candidates(const SelectCandidatesArgs& args, int64_t batch, void* workspace, void* stream);

void adjust_and_pick(const AdjustAndPickArgs& args, int64_t batch, void* stream);

void commit(const CommitArgs& args, int64_t batch, void* stream);

}  // namespace cuda
}  // namespace llm2_fast
