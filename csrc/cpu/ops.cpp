// Chooses the kernels of a tier, gives them their working memory and shares rows out among threads.
#include "llm2_fast/ops.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "kernels.h"
#include "llm2_fast/thread_pool.h"
#include "prefix_stream.h"

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

// Calls work(part, worker index) for parts that together make up `rows`.
template <typename Work>
void each_part(RowRange rows, int num_threads, const Work& work) {
  run_parallel(num_threads, 1, [&](Worker& worker) {
    worker.each(rows.end - rows.begin,
                [&](RowRange part) { work(RowRange{rows.begin + part.begin, rows.begin + part.end}, worker.index()); });
  });
}

// Runs of rows of one sequence, short enough for attention to take them together.
std::vector<RowRange> attention_tiles(const int32_t* row_sequence, RowRange rows) {
  std::vector<RowRange> tiles;
  for (int64_t begin = rows.begin, end; begin < rows.end; begin = end) {
    const int64_t limit = std::min(rows.end, begin + kAttentionTileRows);
    for (end = begin + 1; end < limit && row_sequence[end] == row_sequence[begin];) ++end;
    tiles.push_back({begin, end});
  }
  return tiles;
}

// Working memory, one piece per thread. Not initialized.
class Workspaces {
 public:
  Workspaces(int num_threads, int64_t bytes) {
    for (int i = 0; i < num_threads; ++i) pieces_.emplace_back(new unsigned char[static_cast<size_t>(bytes)]);
  }
  void* of_thread(int index) const { return pieces_[static_cast<size_t>(index)].get(); }

 private:
  std::vector<std::unique_ptr<unsigned char[]>> pieces_;
};

}  // namespace

void select_candidates(const SelectCandidatesArgs& args, RowRange rows, Isa isa, int num_threads) {
  const KernelTable& table = kernels(isa);
  each_part(rows, num_threads, [&](RowRange part, int) { table.select_candidates(args, part); });
}

void adjust_and_pick(const AdjustAndPickArgs& args, RowRange rows, Isa isa, int num_threads) {
  const KernelTable& table = kernels(isa);
  const Workspaces workspaces(num_threads, table.adjust_and_pick_workspace(args));
  each_part(rows, num_threads,
            [&](RowRange part, int thread) { table.adjust_and_pick(args, part, workspaces.of_thread(thread)); });
}

void branch_attention(const BranchAttentionArgs& args, RowRange rows, Isa isa, int num_threads) {
  const KernelTable& table = kernels(isa);
  const Workspaces workspaces(num_threads, table.branch_attention_workspace(args));
  const std::vector<RowRange> tiles = attention_tiles(args.row_sequence, rows);
  const int64_t tasks = static_cast<int64_t>(tiles.size()) * args.num_kv_heads;
  each_part({0, tasks}, num_threads, [&](RowRange part, int thread) {
    for (int64_t task = part.begin; task < part.end; ++task) {
      const int64_t kv_head = task % args.num_kv_heads;
      const RowRange tile = tiles[static_cast<size_t>(task / args.num_kv_heads)];
      const PrefixRun run = {&args, tile.begin, kv_head, first_visible(args, tile.begin),
                             args.row_prefix_length[tile.begin]};
      PrefixStream ahead;
      start(&ahead, &run, &run + 1);
      table.branch_attention(args, tile, {kv_head, kv_head + 1}, &ahead, workspaces.of_thread(thread));
    }
  });
}

}  // namespace llm2_fast
