#include "llm2_fast/step.h"

#include <limits>
#include <numeric>
#include <vector>

#include "kernels.h"
#include "llm2_fast/thread_pool.h"

namespace llm2_fast {
namespace {

// So many rows take about as long as reading the weights once more.
constexpr int64_t kRowsPerSweep = 12;

// The branches of all sequences as rows of a pass, followed by their adapted twins if there are any; or the twins
// alone.
struct Branches {
  std::vector<int32_t> token_ids, slots, positions;
  std::vector<uint8_t> stored;
  std::vector<int64_t> first_row;  // of each sequence
  int64_t count = 0;               // of the LLM's rows

  Branches(const StepBatch& batch, const AdaptedBranches* adapted, bool only_twins) {
    if (!only_twins) {
      add(batch, batch.slots);
      count = static_cast<int64_t>(token_ids.size());
    }
    if (adapted != nullptr) add(batch, adapted->slots);
    stored.resize(token_ids.size(), 0);
  }

  DecoderRows rows(const AdaptedBranches* adapted) const {
    return {static_cast<int64_t>(token_ids.size()),
            token_ids.data(),
            slots.data(),
            positions.data(),
            stored.data(),
            count,
            adapted == nullptr ? nullptr : &adapted->cache};
  }

 private:
  void add(const StepBatch& batch, const int32_t* batch_slots) {
    for (int64_t b = 0; b < batch.size; ++b) {
      if (static_cast<int64_t>(first_row.size()) < batch.size)
        first_row.push_back(static_cast<int64_t>(token_ids.size()));
      const int32_t* ids = batch.select.ids + b * batch.select.max_candidates;
      token_ids.insert(token_ids.end(), ids, ids + batch.select.count[b]);
      slots.resize(token_ids.size(), batch_slots[b]);
      positions.resize(token_ids.size(), batch.lengths[b]);
    }
  }
};

// Whether the twins should run first and the LLM after the pick, for the chosen tokens alone: one more sweep over the
// weights, but fewer rows.
bool runs_twins_first(const StepBatch& batch, const AdaptedBranches* adapted) {
  const int64_t branches = std::accumulate(batch.select.count, batch.select.count + batch.size, int64_t{0});
  return adapted != nullptr && branches - batch.size >= kRowsPerSweep;
}

// Runs the LLM on the tokens that were picked and commits them.
void extend_by_picked(Decoder& decoder, const PagedCache& cache, const StepBatch& batch, int num_threads) {
  std::vector<int32_t> token_ids, slots, positions;
  for (int64_t b = 0; b < batch.size; ++b) {
    if (batch.pick.index[b] < 0) continue;
    token_ids.push_back(batch.pick.token[b]);
    slots.push_back(batch.slots[b]);
    positions.push_back(batch.lengths[b]);
  }
  const std::vector<uint8_t> stored(token_ids.size(), 1);
  const int64_t count = static_cast<int64_t>(token_ids.size());
  const DecoderRows rows = {count, token_ids.data(), slots.data(), positions.data(), stored.data(), count, nullptr};
  decoder.forward(cache, rows, nullptr, nullptr, num_threads);
  for (int64_t row = 0; row < count; ++row) decoder.keep_row(cache, row);
}

// Scores of the rows from `first_scored` on, by sequence.
void spread_scores(const std::vector<float>& row_scores, int64_t first_scored, const Branches& branches,
                   const StepBatch& batch) {
  const int64_t width = batch.select.max_candidates;
  for (int64_t b = 0; b < batch.size; ++b) {
    const int64_t first = first_scored + branches.first_row[static_cast<size_t>(b)];
    for (int64_t i = 0; i < width; ++i) {
      batch.scores[b * width + i] = i < batch.select.count[b] ? row_scores[static_cast<size_t>(first + i)]
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

// Runs `pending`, then selects; the logits of a row are written where `logits` says so.
void run_and_select(Decoder& decoder, const PagedCache& cache, DecoderRows pending, const StepBatch& batch,
                    float* const* logits, int num_threads) {
  pending.first_adapted = pending.count;
  decoder.forward(cache, pending, nullptr, nullptr, num_threads);
  for (int64_t row = 0; row < pending.count; ++row) decoder.keep_row(cache, row);
  decoder.select(cache, batch.slots, batch.size, batch.select, logits, num_threads);
}

// The rows of a plain step whose pick needs every logit: where tokens are drawn or repetition is penalized. The others'
// is the first candidate, whoever is in the batch beside them.
struct WholeRows {
  std::vector<int64_t> rows;
  std::vector<float> storage;  // [rows, V]
  std::vector<float*> logits;  // [B], null where it is not needed

  WholeRows(const StepBatch& batch, int64_t vocab_size) : logits(static_cast<size_t>(batch.size), nullptr) {
    for (int64_t b = 0; b < batch.size; ++b) {
      if (batch.pick.temperature[b] > 0 || batch.pick.repetition_penalty[b] != 1) rows.push_back(b);
    }
    storage.resize(rows.size() * static_cast<size_t>(vocab_size));
    for (size_t i = 0; i < rows.size(); ++i) {
      logits[static_cast<size_t>(rows[i])] = storage.data() + i * static_cast<size_t>(vocab_size);
    }
  }
};

// A plain step's pick from all logits.
void pick_from_all(AdjustAndPickArgs args, const WholeRows& whole, const StepBatch& batch, int64_t vocab_size, Isa isa,
                   int num_threads) {
  if (whole.rows.empty()) return;
  std::vector<int32_t> ids(static_cast<size_t>(vocab_size));
  std::iota(ids.begin(), ids.end(), 0);
  std::vector<int32_t> count;
  for (int64_t b = 0; b < batch.size; ++b) {
    count.push_back(batch.select.count[b] > 0 ? static_cast<int32_t>(vocab_size) : 0);
  }
  args.max_candidates = vocab_size;
  args.candidate_ids = ids.data();
  args.candidate_ids_row_stride = 0;
  args.candidate_logits_row_stride = 0;
  args.count = count.data();
  args.seen = batch.seen;
  args.seen_row_stride = vocab_size;
  const KernelTable& table = kernels(isa);
  const int64_t bytes = table.adjust_and_pick_workspace(args);
  std::vector<AlignedBuffer> workspaces;
  for (int i = 0; i < num_threads; ++i) workspaces.emplace_back(bytes);
  run_parallel(num_threads, 1, [&](Worker& worker) {
    void* workspace = workspaces[static_cast<size_t>(worker.index())].data();
    worker.each(static_cast<int64_t>(whole.rows.size()), [&](RowRange range) {
      for (int64_t i = range.begin; i < range.end; ++i) {
        const int64_t row = whole.rows[static_cast<size_t>(i)];
        AdjustAndPickArgs mine = args;
        mine.candidate_logits = whole.logits[static_cast<size_t>(row)];
        table.adjust_and_pick(mine, {row, row + 1}, workspace);
      }
    });
  });
}

// A plain step's pick where it is the first candidate.
void pick_first(const StepBatch& batch, int64_t row, int64_t vocab_size) {
  const AdjustAndPickArgs& pick = batch.pick;
  const bool usable = batch.select.count[row] > 0;
  const int32_t token = usable ? batch.select.ids[row] : -1;
  const float logit = batch.select.candidate_logits[row];
  pick.index[row] = pick.token[row] = pick.system1_index[row] = token;
  pick.logprob[row] = usable ? logit - batch.select.logsumexp[row] : std::numeric_limits<float>::quiet_NaN();
  pick.finished[row] = usable && is_eos(pick, row, token);
  if (usable) pick.adjusted[row * vocab_size + token] = logit;
}

}  // namespace

void propose(Decoder& decoder, const PagedCache& cache, const DecoderRows& pending, StepBatch& batch, int num_threads) {
  const std::vector<float*> none(static_cast<size_t>(batch.size), nullptr);
  run_and_select(decoder, cache, pending, batch, none.data(), num_threads);
}

void plain_step(Decoder& decoder, const PagedCache& cache, const DecoderRows& pending, StepBatch& batch,
                int num_threads) {
  const int64_t vocab_size = decoder.spec().vocab_size;
  const WholeRows whole(batch, vocab_size);
  run_and_select(decoder, cache, pending, batch, whole.logits.data(), num_threads);
  pick_from_all(batch.pick, whole, batch, vocab_size, decoder.isa(), num_threads);
  for (int64_t b = 0; b < batch.size; ++b) {
    if (whole.logits[static_cast<size_t>(b)] == nullptr) pick_first(batch, b, vocab_size);
  }
}

void joint_step(Decoder& decoder, const PagedCache& cache, const ScoreHead& head, const AdaptedBranches* adapted,
                StepBatch& batch, int num_threads) {
  propose(decoder, cache, {0, nullptr, nullptr, nullptr, nullptr}, batch, num_threads);

  const bool twins_first = runs_twins_first(batch, adapted);
  const Branches branches(batch, adapted, twins_first);
  const DecoderRows rows = branches.rows(adapted);
  std::vector<float> row_scores(static_cast<size_t>(rows.count));
  decoder.forward(cache, rows, &head, row_scores.data(), num_threads);
  const int64_t first_twin = adapted == nullptr ? 0 : branches.count;
  spread_scores(row_scores, first_twin, branches, batch);

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
  adjust_and_pick(batch.pick, {0, batch.size}, decoder.isa(), num_threads);

  for (int64_t b = 0; b < batch.size; ++b) {
    if (batch.pick.index[b] < 0) continue;
    const int64_t chosen = branches.first_row[static_cast<size_t>(b)] + batch.pick.index[b];
    if (!twins_first) decoder.keep_row(cache, chosen);
    if (adapted != nullptr) decoder.keep_row(adapted->cache, first_twin + chosen);
  }
  if (twins_first) extend_by_picked(decoder, cache, batch, num_threads);
}

}  // namespace llm2_fast
