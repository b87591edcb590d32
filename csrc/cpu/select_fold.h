// Plausible candidates (LLM2, equation 1) while the logits are computed: each panel of a row is folded into its
// maximum, its sum of exponentials and the calling thread's ranking. No logit needs to be written.
//
// The maximum is not known yet, so a thread ranks what is plausible beside the largest logit it has met. The panels'
// sums are merged in the order of panels and the rankings hold no rounded number: the result does not depend on which
// thread met which panel.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "ranking.h"
#include "select_candidates.h"
#include "vector_math.h"

namespace llm2_fast {
namespace LLM2_FAST_TIER {

// Takes in the logits [size] of a panel, those of the ids from `first` on.
static void fold_logits(const SelectFold& select, int64_t panel, int64_t row, int64_t first, const float* logits,
                        int64_t size, LogitRanking* ranking) {
  if (select.logits[row] != nullptr) {
    std::memcpy(select.logits[row] + first, logits, static_cast<size_t>(size) * sizeof(float));
  }
  const int64_t known = select.args->vocab_size - first;
  if (size > known) size = known > 0 ? known : 0;
  const float largest = maximum(logits, size);
  const float base = largest == -kInfinity ? 0.0f : largest;  // the terms are 0, or NaN, which must not be lost
  select.panel_max[row * select.num_panels + panel] = largest;
  select.panel_sum[row * select.num_panels + panel] = sum_exp(logits, size, base);

  if (largest > ranking->max) ranking->max = largest;
  Ranking entries = {ranking->logits, ranking->ids, select.capacity, ranking->size, false};
  const auto bound = [&] {
    const float threshold = plausible_from(ranking->max, select.args->log_alpha[row]);
    const bool full = entries.size == entries.capacity;
    return full && entries.logits[0] > threshold ? entries.logits[0] : threshold;
  };
  if (!(largest >= bound())) return;
  visit_where(
      logits, 0, size, [&](Vec z) { return at_least(z, set1(bound())); },
      [&](int64_t i) { entries.offer(logits[i], static_cast<int32_t>(first + i)); });
  ranking->size = entries.size;
}

// Maximum and sum of exponentials of a row, from its panels.
static RowStats merge_panels(const SelectFold& select, int64_t row) {
  const float* max = select.panel_max + row * select.num_panels;
  const float* sum = select.panel_sum + row * select.num_panels;
  RowStats stats = {maximum(max, select.num_panels), 0.0f};
  const Vec base = set1(stats.max == -kInfinity ? 0.0f : stats.max);
  Vec total = set1(0.0f);
  for (int64_t i = 0; i < select.num_panels; i += kLanes) {
    const int rest = static_cast<int>(select.num_panels - i);
    const bool whole = rest >= kLanes;
    const Vec panel_max = whole ? load(max + i) : load_partial(max + i, rest, -kInfinity);
    const Vec panel_sum = whole ? load(sum + i) : load_partial(sum + i, rest, 0.0f);
    total = fma(panel_sum, exp_nonpositive(sub(panel_max, base)), total);
  }
  stats.sum_exp = sum_lanes(total);
  return stats;
}

static void finish_selection_row(const SelectFold& select, int num_threads, int64_t rows, int64_t row) {
  const SelectCandidatesArgs& args = *select.args;
  const RowStats stats = merge_panels(select, row);
  Ranking ranking = row_ranking(args, row);
  if (stats.usable()) {
    const float threshold = plausible_from(stats.max, args.log_alpha[row]);
    for (int thread = 0; thread < num_threads; ++thread) {
      const LogitRanking& met = select.rankings[thread * rows + row];
      for (int64_t i = 0; i < met.size; ++i) {
        if (met.logits[i] >= threshold) ranking.offer(met.logits[i], met.ids[i]);
      }
    }
  }
  finish_row_ranking(args, row, stats, &ranking);
}

static void finish_selection(const SelectFold& select, int num_threads, int64_t rows, RowRange range) {
  for (int64_t row = range.begin; row < range.end; ++row) finish_selection_row(select, num_threads, rows, row);
}

}  // namespace LLM2_FAST_TIER
}  // namespace llm2_fast
