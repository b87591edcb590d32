// The ops of the C API on the CPU.
#include "arguments.h"
#include "status.h"

using namespace llm2_fast;

namespace {

// What a commit reads and writes lies inside of the cache.
void check_commit_indices(const llm2_fast_commit_args& args) {
  PagedCache cache = {};
  cache.num_blocks = args.num_blocks;
  cache.block_size = args.block_size;
  cache.num_slots = args.num_slots;
  cache.max_blocks = args.max_blocks;
  cache.block_table = args.block_table;
  cache.block_table_row_stride = args.block_table_row_stride;
  require_distinct("slots", args.slots, args.batch_size);
  for (int64_t b = 0; b < args.batch_size; ++b) {
    if (args.index[b] < 0) continue;
    require_at_least("first_row", args.first_row[b], 0);
    require_index("first_row + index", int64_t{args.first_row[b]} + args.index[b], args.num_rows);
    check_slot(cache, args.slots[b]);
    require_at_least("lengths", args.lengths[args.slots[b]], 0);
    check_blocks(cache, args.slots[b], int64_t{args.lengths[args.slots[b]]} + 1);
  }
}

}  // namespace

llm2_fast_status llm2_fast_select_candidates(const llm2_fast_select_candidates_args* args, int32_t num_threads) {
  return guarded([&] {
    const auto given = read_struct("args", args);
    require_at_least("num_threads", num_threads, 1);
    select_candidates(read_args(given, Device::kCpu), {0, given.batch_size}, active_isa(), num_threads);
  });
}

llm2_fast_status llm2_fast_adjust_and_pick(const llm2_fast_adjust_and_pick_args* args, int32_t num_threads) {
  return guarded([&] {
    const auto given = read_struct("args", args);
    require_at_least("num_threads", num_threads, 1);
    adjust_and_pick(read_args(given), {0, given.batch_size}, active_isa(), num_threads);
  });
}

llm2_fast_status llm2_fast_branch_attention(const llm2_fast_branch_attention_args* args, int32_t num_threads) {
  return guarded([&] {
    const auto given = read_struct("args", args);
    require_at_least("num_threads", num_threads, 1);
    branch_attention(read_args(given), {0, given.num_rows}, active_isa(), num_threads);
  });
}

llm2_fast_status llm2_fast_commit(const llm2_fast_commit_args* args) {
  return guarded([&] {
    const auto given = read_struct("args", args);
    const CommitArgs read = read_args(given, Device::kCpu);
    check_commit_indices(given);
    commit(read, {0, given.batch_size});
  });
}
