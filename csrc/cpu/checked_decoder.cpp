#include "llm2_fast/checked_decoder.h"

#include <utility>

#include "llm2_fast/checks.h"

namespace llm2_fast {

CheckedDecoder::CheckedDecoder(DecoderWeights weights, Isa isa) : decoder_(std::move(weights), isa) {}

void CheckedDecoder::forward(const PagedCache& cache, const DecoderRows& rows, const ScoreHead* head, float* scores,
                             int num_threads) {
  require_at_least("num_threads", num_threads, 1);
  check_rows(cache, rows, spec().vocab_size);
  if (head != nullptr) check_head(*head, weights());
  const std::lock_guard<std::mutex> turn(mutex_);
  slots_.clear();
  decoder_.forward(cache, rows, head, scores, num_threads);
  positions_.assign(rows.positions, rows.positions + rows.count);
  slots_.assign(rows.slots, rows.slots + rows.count);
}

void CheckedDecoder::keep_row(const PagedCache& cache, int64_t row) {
  const std::lock_guard<std::mutex> turn(mutex_);
  require_index("row", row, static_cast<int64_t>(slots_.size()));
  const size_t i = static_cast<size_t>(row);
  check_slot(cache, slots_[i]);
  check_blocks(cache, slots_[i], int64_t{positions_[i]} + 1);
  decoder_.keep_row(cache, row);
}

void CheckedDecoder::propose(const PagedCache& cache, const DecoderRows& pending, StepBatch batch, int num_threads) {
  check_rows(cache, pending, spec().vocab_size);
  check_step(cache, batch, num_threads);
  const std::lock_guard<std::mutex> turn(mutex_);
  slots_.clear();
  llm2_fast::propose(decoder_, cache, pending, batch, num_threads);
}

void CheckedDecoder::plain_step(const PagedCache& cache, const DecoderRows& pending, StepBatch batch, int num_threads) {
  check_rows(cache, pending, spec().vocab_size);
  check_step(cache, batch, num_threads);
  require_equal("max_candidates", batch.select.max_candidates, 1);
  require_equal("max_candidates of pick", batch.pick.max_candidates, spec().vocab_size);
  const std::lock_guard<std::mutex> turn(mutex_);
  slots_.clear();
  llm2_fast::plain_step(decoder_, cache, pending, batch, num_threads);
}

void CheckedDecoder::joint_step(const PagedCache& cache, const ScoreHead& head, const AdaptedBranches* adapted,
                                StepBatch batch, int num_threads) {
  check_step(cache, batch, num_threads);
  require_equal("max_candidates of pick", batch.pick.max_candidates, batch.select.max_candidates);
  if (batch.scores == nullptr) throw argument_error("scores", "a tensor", "none");
  check_head(head, weights());
  for (int64_t b = 0; b < batch.size; ++b) {
    require_at_least("lengths", batch.lengths[b], 0);
    check_blocks(cache, batch.slots[b], int64_t{batch.lengths[b]} + 1);
    if (adapted == nullptr) continue;
    check_slot(adapted->cache, adapted->slots[b]);
    check_blocks(adapted->cache, adapted->slots[b], int64_t{batch.lengths[b]} + 1);
  }
  const std::lock_guard<std::mutex> turn(mutex_);
  slots_.clear();
  llm2_fast::joint_step(decoder_, cache, head, adapted, batch, num_threads);
}

void CheckedDecoder::check_step(const PagedCache& cache, const StepBatch& batch, int num_threads) const {
  require_at_least("num_threads", num_threads, 1);
  if (weights().lm_head == nullptr) throw argument_error("decoder", "one with an lm_head", "one without");
  require_at_least("max_candidates", batch.select.max_candidates, 1);
  require_at_least("vocab_size", batch.select.vocab_size, 1);
  if (batch.select.vocab_size > spec().vocab_size) {
    throw argument_error("vocab_size", "at most " + std::to_string(spec().vocab_size),
                         std::to_string(batch.select.vocab_size));
  }
  for (int64_t b = 0; b < batch.size; ++b) check_slot(cache, batch.slots[b]);
}

}  // namespace llm2_fast
