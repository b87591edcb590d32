// The ops on the GPU, in a library that lacks them.
#include "status.h"

using llm2_fast::fail;

namespace {

constexpr char kMessage[] = "the library was built without CUDA (LLM2_FAST_CUDA=ON builds it with)";

}  // namespace

llm2_fast_status llm2_fast_cuda_select_candidates_workspace(const llm2_fast_select_candidates_args*, size_t*) {
  return fail(LLM2_FAST_UNAVAILABLE, kMessage);
}

llm2_fast_status llm2_fast_cuda_select_candidates(const llm2_fast_select_candidates_args*, void*, size_t, void*) {
  return fail(LLM2_FAST_UNAVAILABLE, kMessage);
}

llm2_fast_status llm2_fast_cuda_adjust_and_pick(const llm2_fast_adjust_and_pick_args*, void*) {
  return fail(LLM2_FAST_UNAVAILABLE, kMessage);
}

llm2_fast_status llm2_fast_cuda_commit(const llm2_fast_commit_args*, void*) {
  return fail(LLM2_FAST_UNAVAILABLE, kMessage);
}
