#include "llm2_fast/step.h"

#include <limits>
#include <numeric>
#include <vector>

#include "kernels.h"
#include "llm2_fast/thread_pool.h"

namespace llm2_fast {
namespace {

void pick_parallel(const AdjustAndPickArgs& args, int64_t rows, Isa isa, int num_threads) {
  const KernelTable& table = kernels(isa);
  const int64_t bytes = table.adjust_and_pick_workspace(args);
  std::vector<AlignedBuffer> workspaces;
  for (int i = 0; i < num_threads; ++i) workspaces.emplace_back(bytes);
  run_parallel(num_threads, 1, [&](Worker& worker) {
    void* workspace = workspaces[static_cast<size_t>(worker.index())].data();
    worker.each(rows, [&](RowRange range) { table.adjust_and_pick(args, range, workspace); });
  });
}

// The branches of all sequences as rows of a pass.
struct Branches {
  std::vector<int32_t> token_ids, slots, positions;
  std::vector<uint8_t> stored;
  std::vector<int64_t> first_row;  // of each sequence

  explicit Branches(const StepBatch& batch) {
    for (int64_t b = 0; b < batch.size; ++b) {
      first_row.push_back(static_cast<int64_t>(token_ids.size()));
      const int32_t* ids = batch.select.ids + b * batch.select.max_candidates;
      token_ids.insert(token_ids.end(), ids, ids + batch.select.count[b]);
      slots.resize(token_ids.size(), batch.slots[b]);
      positions.resize(token_ids.size(), batch.lengths[b]);
    }
    stored.resize(token_ids.size(), 0);
  }

  DecoderRows rows() const {
    return {static_cast<int64_t>(token_ids.size()), token_ids.data(), slots.data(), positions.data(), stored.data()};
  }
};

void spread_scores(const std::vector<float>& row_scores, const Branches& branches, const StepBatch& batch) {
  const int64_t width = batch.select.max_candidates;
  for (int64_t b = 0; b < batch.size; ++b) {
    for (int64_t i = 0; i < width; ++i) {
      batch.scores[b * width + i] =
          i < batch.select.count[b] ? row_scores[static_cast<size_t>(branches.first_row[static_cast<size_t>(b)] + i)]
                                    : -std::numeric_limits<float>::infinity();
    }
  }
}

// Which candidates occur in their sequence, [B, K].
std::vector<uint8_t> seen_candidates(const StepBatch& batch, int64_t vocab_size) {
  const int64_t width = batch.select.max_candidates;
  std::vector<uint8_t> seen(static_cast<size_t>(batch.size * width), 0);
  for (int64_t b = 0; b < batch.size; ++b) {
    for (int64_t i = 0; i < batch.select.count[b]; ++i) {
      seen[static_cast<size_t>(b * width + i)] = batch.seen[b * vocab_size + batch.select.ids[b * width + i]];
    }
  }
  return seen;
}

}  // namespace

void propose(Decoder& decoder, const PagedCache& cache, const DecoderRows& pending, StepBatch& batch, int num_threads) {
  decoder.forward(cache, pending, nullptr, nullptr, num_threads);
  for (int64_t row = 0; row < pending.count; ++row) decoder.keep_row(cache, row);
  batch.select.dtype = DType::kFloat32;
  batch.select.logits = decoder.logits(cache, batch.slots, batch.size, num_threads);
  batch.select.logits_row_stride = decoder.spec().vocab_size;
  const KernelTable& table = kernels(decoder.isa());
  run_parallel(num_threads, 1, [&](Worker& worker) {
    worker.each(batch.size, [&](RowRange rows) { table.select_candidates(batch.select, rows); });
  });
}

void plain_step(Decoder& decoder, const PagedCache& cache, const DecoderRows& pending, StepBatch& batch,
                int num_threads) {
  propose(decoder, cache, pending, batch, num_threads);
  const int64_t vocab_size = decoder.spec().vocab_size;
  std::vector<int32_t> ids(static_cast<size_t>(vocab_size));
  std::iota(ids.begin(), ids.end(), 0);
  std::vector<int32_t> count;
  for (int64_t b = 0; b < batch.size; ++b) {
    count.push_back(batch.select.count[b] > 0 ? static_cast<int32_t>(vocab_size) : 0);
  }
  batch.pick.max_candidates = vocab_size;
  batch.pick.candidate_ids = ids.data();
  batch.pick.candidate_ids_row_stride = 0;
  batch.pick.candidate_logits = static_cast<const float*>(batch.select.logits);
  batch.pick.candidate_logits_row_stride = vocab_size;
  batch.pick.count = count.data();
  batch.pick.seen = batch.seen;
  batch.pick.seen_row_stride = vocab_size;
  pick_parallel(batch.pick, batch.size, decoder.isa(), num_threads);
}

void joint_step(Decoder& decoder, const PagedCache& cache, const ScoreHead& head, StepBatch& batch, int num_threads) {
  propose(decoder, cache, {0, nullptr, nullptr, nullptr, nullptr}, batch, num_threads);

  const Branches branches(batch);
  const DecoderRows rows = branches.rows();
  std::vector<float> row_scores(static_cast<size_t>(rows.count));
  decoder.forward(cache, rows, &head, row_scores.data(), num_threads);
  spread_scores(row_scores, branches, batch);

  const int64_t width = batch.select.max_candidates;
  std::vector<uint8_t> seen;
  if (batch.seen != nullptr) seen = seen_candidates(batch, decoder.spec().vocab_size);
  batch.pick.max_candidates = width;
  batch.pick.candidate_ids = batch.select.ids;
  batch.pick.candidate_logits = batch.select.candidate_logits;
  batch.pick.count = batch.select.count;
  batch.pick.scores = batch.scores;
  batch.pick.seen = batch.seen == nullptr ? nullptr : seen.data();
  batch.pick.candidate_ids_row_stride = batch.pick.candidate_logits_row_stride = width;
  batch.pick.scores_row_stride = batch.pick.seen_row_stride = width;
  pick_parallel(batch.pick, batch.size, decoder.isa(), num_threads);

  for (int64_t b = 0; b < batch.size; ++b) {
    if (batch.pick.index[b] < 0) continue;
    decoder.keep_row(cache, branches.first_row[static_cast<size_t>(b)] + batch.pick.index[b]);
  }
}

}  // namespace llm2_fast
