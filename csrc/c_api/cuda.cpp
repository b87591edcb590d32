// The ops on the GPU, in a library that has them.
#include "../cuda/ops.h"
#include "arguments.h"
#include "status.h"

using namespace llm2_fast;

namespace {

void check_width(const llm2_fast_select_candidates_args& args) {
  require_size("batch_size", args.batch_size, 0);
  require_size("vocab_size", args.vocab_size, 1);
  require_at_least("max_candidates", args.max_candidates, 1);
  require_at_most("max_candidates", args.max_candidates, cuda::kMaxCandidates);
}

int64_t workspace_bytes_of(const llm2_fast_select_candidates_args& args) {
  SelectCandidatesArgs sizes = {};
  sizes.vocab_size = args.vocab_size;
  sizes.max_candidates = args.max_candidates;
  return cuda::select_candidates_workspace(sizes, args.batch_size);
}

}  // namespace

llm2_fast_status llm2_fast_cuda_select_candidates_workspace(const llm2_fast_select_candidates_args* args,
                                                            size_t* bytes) {
  return guarded([&] {
    const auto given = read_struct("args", args);
    check_width(given);
    if (bytes == nullptr) throw argument_error("bytes", "a pointer", "NULL");
    *bytes = static_cast<size_t>(workspace_bytes_of(given));
  });
}

llm2_fast_status llm2_fast_cuda_select_candidates(const llm2_fast_select_candidates_args* args, void* workspace,
                                                  size_t workspace_bytes, void* stream) {
  return guarded([&] {
    const auto given = read_struct("args", args);
    check_width(given);
    const SelectCandidatesArgs read = read_args(given, Device::kCuda);
    const int64_t needed = workspace_bytes_of(given);
    require_at_least("workspace_bytes", static_cast<int64_t>(workspace_bytes), needed);
    require_pointer("workspace", static_cast<char*>(workspace), needed, 16);
    cuda::select_candidates(read, given.batch_size, workspace, stream);
  });
}

llm2_fast_status llm2_fast_cuda_adjust_and_pick(const llm2_fast_adjust_and_pick_args* args, void* stream) {
  return guarded([&] {
    const auto given = read_struct("args", args);
    require_at_most("max_candidates", given.max_candidates, cuda::kMaxPickCandidates);
    cuda::adjust_and_pick(read_args(given), given.batch_size, stream);
  });
}

llm2_fast_status llm2_fast_cuda_commit(const llm2_fast_commit_args* args, void* stream) {
  return guarded([&] {
    const auto given = read_struct("args", args);
    cuda::commit(read_args(given, Device::kCuda), given.batch_size, stream);
  });
}
