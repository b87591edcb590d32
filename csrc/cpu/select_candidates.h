// Plausible candidates, C = {v : z_v >= max z + ln(alpha)} (LLM2, equation 1).
//
// One pass over memory finds the maximum of each block and the sum of exponentials; the gather then revisits only the
// blocks whose maximum is plausible.
#pragma once

#include <cstdint>

#include "llm2_fast/ops.h"
#include "ranking.h"
#include "vector_math.h"

namespace llm2_fast {
namespace LLM2_FAST_TIER {

constexpr int64_t kMaxBlocks = 256;

template <typename T>
static void gather_plausible(const T* logits, int64_t vocab, int64_t block, const float* block_max, float threshold,
                             Ranking* ranking) {
  for (int64_t begin = 0; begin < vocab; begin += block) {
    if (!(block_max[begin / block] >= threshold)) continue;
    const int64_t end = begin + block < vocab ? begin + block : vocab;
    visit_where(
        logits, begin, end, [&](Vec z) { return at_least(z, set1(threshold)); },
        [&](int64_t i) {
          ranking->offer(to_float(logits[i]), static_cast<int32_t>(i));
          // Once one is known not to fit, none below the last that is in can matter.
          if (ranking->dropped) threshold = ranking->logits[0];
        });
  }
}

// The smallest plausible logit beside a maximum. Tokens of probability zero are never candidates; NaN stays, and
// nothing reaches it.
static inline float plausible_from(float max, float log_alpha) {
  const float threshold = max + log_alpha;
  return threshold < -FLT_MAX ? -FLT_MAX : threshold;
}

// The number of candidates that `candidate_top_k` allows.
static inline int64_t candidate_limit(const SelectCandidatesArgs& args, int64_t row) {
  const int32_t top_k = args.candidate_top_k[row];
  return top_k > 0 && top_k < args.vocab_size ? top_k : args.vocab_size;
}

// An empty ranking in the outputs of a row.
static Ranking row_ranking(const SelectCandidatesArgs& args, int64_t row) {
  const int64_t limit = candidate_limit(args, row);
  const int64_t offset = row * args.max_candidates;
  return {args.candidate_logits + offset, args.ids + offset, limit < args.max_candidates ? limit : args.max_candidates,
          0, false};
}

static void finish_row_ranking(const SelectCandidatesArgs& args, int64_t row, const RowStats& stats, Ranking* ranking) {
  ranking->sort();
  for (int64_t i = ranking->size; i < args.max_candidates; ++i) {
    args.ids[row * args.max_candidates + i] = -1;
    args.candidate_logits[row * args.max_candidates + i] = -kInfinity;
  }
  args.count[row] = static_cast<int32_t>(ranking->size);
  args.logsumexp[row] = stats.usable() ? stats.logsumexp() : __builtin_nanf("");
  args.cut[row] = ranking->dropped && candidate_limit(args, row) > args.max_candidates;
}

template <typename T>
static void select_row(const SelectCandidatesArgs& args, int64_t row) {
  const int64_t vocab = args.vocab_size;
  const T* logits = static_cast<const T*>(args.logits) + row * args.logits_row_stride;
  const int64_t blocks_wanted = (vocab + kMaxBlocks - 1) / kMaxBlocks;
  const int64_t block = blocks_wanted > kStatsBlock ? blocks_wanted : kStatsBlock;
  float block_max[kMaxBlocks];
  const RowStats stats = row_stats(logits, vocab, block, block_max);
  Ranking ranking = row_ranking(args, row);
  if (stats.usable()) {
    gather_plausible(logits, vocab, block, block_max, plausible_from(stats.max, args.log_alpha[row]), &ranking);
  }
  finish_row_ranking(args, row, stats, &ranking);
}

static void select_candidates(const SelectCandidatesArgs& args, RowRange rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    args.dtype == DType::kFloat32 ? select_row<float>(args, row) : select_row<BFloat16>(args, row);
  }
}

}  // namespace LLM2_FAST_TIER
}  // namespace llm2_fast
