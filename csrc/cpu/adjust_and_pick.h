// Adjusted logits z* = z + beta * s (LLM2, equation 3), sampling processors and the pick.
//
// What top-k, top-p and min-p leave is always a head of the ranking by (logit descending, id ascending), so all three
// come down to one cutoff, and nothing is sorted beyond it. Gumbel noise is bounded, so it is drawn only for tokens
// that could still win; the result is exactly the argmax over all.
#pragma once

#include <math.h>

#include <cstdint>

#include "llm2_fast/ops.h"
#include "llm2_fast/philox.h"
#include "ranking.h"
#include "vector_math.h"

namespace llm2_fast {
namespace LLM2_FAST_TIER {

// Three arrays of K: processed logits, and logits and ids of the ranking.
static int64_t adjust_and_pick_workspace(const AdjustAndPickArgs& args) {
  return args.max_candidates * static_cast<int64_t>(2 * sizeof(float) + sizeof(int32_t));
}

// The candidates of one row and its workspace.
struct PickRow {
  const AdjustAndPickArgs& args;
  int64_t row;
  int64_t count;       // in [0, K]
  const int32_t* ids;  // [count]
  float* processed;    // [K]
  float* ranked_logits;
  int32_t* ranked_ids;
};

// The last token in rank that survives.
struct Cutoff {
  float logit;
  int32_t id;
};

// Repetition penalty and temperature. Returns `logits` itself if neither changes anything.
static const float* penalize_and_scale(const PickRow& r, const float* logits) {
  const AdjustAndPickArgs& args = r.args;
  const uint8_t* seen = args.seen == nullptr ? nullptr : args.seen + r.row * args.seen_row_stride;
  const float penalty = args.repetition_penalty[r.row];
  const float divisor = args.temperature[r.row] > 0 ? args.temperature[r.row] : 1.0f;
  const bool penalize = seen != nullptr && penalty != 1.0f;
  if (!penalize && divisor == 1.0f) return logits;
  for (int64_t i = 0; i < r.count; ++i) {
    float x = logits[i];
    if (penalize && seen[i]) x = x > 0 ? x / penalty : x * penalty;
    r.processed[i] = x / divisor;
  }
  return r.processed;
}

// The first `capacity` in rank of the logits that are at least `floor`.
static Ranking rank_logits(const PickRow& r, const float* logits, int64_t capacity, float floor) {
  Ranking ranking = {r.ranked_logits, r.ranked_ids, capacity, 0, false};
  visit_where(
      logits, 0, r.count,
      [&](Vec x) { return at_least(x, set1(ranking.size == capacity ? ranking.logits[0] : floor)); },
      [&](int64_t i) { ranking.offer(logits[i], r.ids[i]); });
  return ranking;
}

// The last of the ranking, in rank, before which the sum of exp(x - top) is below `mass`.
static Cutoff cut_mass(const Ranking& ranking, float top, float mass) {
  make_heap<Root::kFirst>(ranking.logits, ranking.ids, ranking.size);
  Cutoff cutoff = {ranking.logits[0], ranking.ids[0]};
  double sum = 0.0;
  for (int64_t rest = ranking.size; rest > 0; --rest) {
    const float weight = exp_nonpositive(ranking.logits[0] - top);
    sum += weight;
    if (!(static_cast<float>(sum) - weight < mass)) break;
    cutoff = {ranking.logits[0], ranking.ids[0]};
    pop_to_end<Root::kFirst>(ranking.logits, ranking.ids, rest);
  }
  return cutoff;
}

// The cutoff of top-k and top-p.
static Cutoff find_cutoff(const PickRow& r, const float* logits, float top) {
  const Cutoff none = {-kInfinity, INT32_MAX};
  const int32_t top_k = r.args.top_k[r.row];
  const float top_p = r.args.top_p[r.row];
  if (top_k > 0) {
    const Ranking ranking = rank_logits(r, logits, top_k < r.count ? top_k : r.count, -FLT_MAX);
    if (ranking.size == 0) return none;
    if (top_p < 1.0f) return cut_mass(ranking, top, top_p * row_stats(ranking.logits, ranking.size).sum_exp);
    return ranking.size < ranking.capacity ? none : Cutoff{ranking.logits[0], ranking.ids[0]};  // the root is the last
  }
  if (!(top_p < 1.0f)) return none;
  // All tokens below this floor together have at most half of the mass that top-p may leave out, so the cutoff lies
  // above it. Few tokens of a large vocabulary do.
  const float total = row_stats(logits, r.count).sum_exp;
  const float floor = top + logf(0.5f * (1.0f - top_p) * total / static_cast<float>(r.count));
  const Ranking ranking = rank_logits(r, logits, r.count, floor > -FLT_MAX ? floor : -FLT_MAX);
  return ranking.size == 0 ? none : cut_mass(ranking, top, top_p * total);
}

// Index of the largest logit, ties to the lowest id.
static int64_t pick_greedy(const PickRow& r, const float* logits, float top) {
  int64_t best = -1;
  visit_where(
      logits, 0, r.count, [&](Vec x) { return at_least(x, set1(top)); },
      [&](int64_t i) { best = best < 0 || r.ids[i] < r.ids[best] ? i : best; });
  return best;
}

// The best of the tokens offered, by (logit plus noise descending, id ascending). Noise is drawn for kDraws tokens at a
// time, in a loop that the compiler turns into vectors.
struct NoisyArgmax {
  static constexpr int kDraws = 64;

  const PickRow& r;
  const float* logits;
  int64_t best;  // -1 if none was offered
  float best_value;
  int waiting;
  int64_t indices[kDraws];

  void offer(int64_t index) {
    indices[waiting++] = index;
    if (waiting == kDraws) draw();
  }

  // Most draws lose, and are found out without a logarithm: since -log(u) >= 1 - u, noise of at least `best - logit`
  // needs 1 - u <= exp(logit - best). The slack is far above all rounding.
  void win_bounds(float* bound) const {
    const float slack = 1e-3f + 1e-6f * fabsf(best_value);
    for (int i = 0; i < waiting; ++i) {
      const float gap = logits[indices[i]] - best_value + slack;
      bound[i] = gap < 0.0f ? gap : 0.0f;  // also where the gap is NaN
    }
    for (int i = 0; i < kDraws; i += kLanes) store(bound + i, exp_nonpositive(load(bound + i)));
  }

  void draw() {
    const AdjustAndPickArgs& args = r.args;
    const uint32_t step = static_cast<uint32_t>(args.step[r.row]);
    const uint32_t sample = static_cast<uint32_t>(args.sample_index[r.row]);
    const uint32_t request = static_cast<uint32_t>(args.request_id[r.row]);
    const uint64_t seed = static_cast<uint64_t>(args.seed[r.row]);
    uint32_t words[kDraws];
    for (int i = 0; i < waiting; ++i) words[i] = static_cast<uint32_t>(r.ids[indices[i]]);
    for (int i = 0; i < waiting; ++i) words[i] = philox({{words[i], step, sample, request}}, seed).words[0];
    float bound[kDraws] = {};
    win_bounds(bound);
    for (int i = 0; i < waiting; ++i) {
      if (1.0f - uniform_from_word(words[i]) > bound[i]) continue;
      const int64_t index = indices[i];
      const float value = logits[index] + gumbel_from_word(words[i]);
      if (best >= 0 && !ranks_before(value, r.ids[index], best_value, r.ids[best])) continue;
      best = index;
      best_value = value;
    }
    waiting = 0;
  }
};

// Index of the largest logit plus noise among what the processors leave, ties to the lowest id.
static int64_t pick_sampled(const PickRow& r, const float* logits, float top) {
  const Cutoff cutoff = find_cutoff(r, logits, top);
  const float log_min_p = r.args.log_min_p[r.row];
  const float min_p_logit = log_min_p > -kInfinity ? top + log_min_p : -kInfinity;
  const float lowest = cutoff.logit > min_p_logit ? cutoff.logit : min_p_logit;
  NoisyArgmax argmax = {r, logits, -1, -kInfinity, 0, {}};
  visit_where(
      logits, 0, r.count,
      [&](Vec x) {
        // Rounding is monotone, so a token below the best even with the bound added cannot win.
        return at_least(x, set1(lowest)) & at_least(add(x, set1(kGumbelBound)), set1(argmax.best_value));
      },
      [&](int64_t i) {
        if (logits[i] != cutoff.logit || r.ids[i] <= cutoff.id) argmax.offer(i);
      });
  argmax.draw();
  return argmax.best;
}

static int64_t pick(const PickRow& r, const float* logits) {
  const float* processed = penalize_and_scale(r, logits);
  const float top = maximum(processed, r.count);
  // Processors never drop the first in rank, so greedy rows need none of them.
  return r.args.temperature[r.row] > 0 ? pick_sampled(r, processed, top) : pick_greedy(r, processed, top);
}

// Fills adjusted [K] and returns whether the scores count.
static bool adjust(const AdjustAndPickArgs& args, int64_t row, int64_t count, const float* logits, float* adjusted) {
  const bool scored = args.scores != nullptr && args.count[row] > 1;
  if (scored) {
    const float* scores = args.scores + row * args.scores_row_stride;
    const float beta = args.beta[row];
    for (int64_t i = 0; i < count; ++i) adjusted[i] = logits[i] + beta * scores[i];
  } else {
    for (int64_t i = 0; i < count; ++i) adjusted[i] = logits[i];
  }
  for (int64_t i = count; i < args.max_candidates; ++i) adjusted[i] = -kInfinity;
  return scored;
}

static void pick_row(const AdjustAndPickArgs& args, int64_t row, void* workspace) {
  const int64_t capacity = args.max_candidates;
  const int32_t given = args.count[row];
  const int64_t count = given < 0 ? 0 : given < capacity ? given : capacity;
  const float* logits = args.candidate_logits + row * args.candidate_logits_row_stride;
  float* adjusted = args.adjusted + row * capacity;
  const bool scored = adjust(args, row, count, logits, adjusted);

  args.index[row] = args.token[row] = args.system1_index[row] = -1;
  args.logprob[row] = __builtin_nanf("");
  args.finished[row] = false;
  const RowStats stats = row_stats(adjusted, count);
  if (!stats.usable()) return;

  float* floats = static_cast<float*>(workspace);
  const PickRow r = {args,
                     row,
                     count,
                     args.candidate_ids + row * args.candidate_ids_row_stride,
                     floats,
                     floats + capacity,
                     static_cast<int32_t*>(static_cast<void*>(floats + 2 * capacity))};
  const int64_t index = pick(r, adjusted);
  if (index < 0) return;  // processors made every logit NaN
  args.index[row] = static_cast<int32_t>(index);
  args.token[row] = r.ids[index];
  args.logprob[row] = adjusted[index] - stats.logsumexp();
  args.system1_index[row] = static_cast<int32_t>(scored ? pick(r, logits) : index);
  args.finished[row] = is_eos(args, row, r.ids[index]);
}

static void adjust_and_pick(const AdjustAndPickArgs& args, RowRange rows, void* workspace) {
  for (int64_t row = rows.begin; row < rows.end; ++row) pick_row(args, row, workspace);
}

}  // namespace LLM2_FAST_TIER
}  // namespace llm2_fast
