// Adjusted logits z* = z + beta * s (LLM2, equation 3), sampling processors and the pick. A block per row.
//
// What top-k, top-p and min-p leave is always a head of the ranking by (logit descending, id ascending), so top-k and
// top-p come down to a key that the survivors reach. It is found byte by byte, from sums of weights: 1 per token for
// top-k, its probability in fixed point for top-p, so that no sum depends on the order of threads. Gumbel noise is
// bounded, so it is drawn only for tokens that could still win; the result is exactly the argmax over all.
#include <cfloat>

#include "block.cuh"
#include "launch.cuh"
#include "llm2_fast/philox.h"
#include "ops.h"

namespace llm2_fast {
namespace cuda {
namespace {

constexpr int kMaxThreads = 1024;
constexpr float kGumbelFloor = -2.82f;  // below every value of gumbel_from_word; the smallest is -2.8116
constexpr float kMassOfTop = 0x1p40f;   // of the largest logit, in fixed point
static_assert(kMaxPickCandidates <= (1 << 23), "the mass of all candidates fits into a word");

struct PickScratch {
  ReduceScratch reduce;
  CutoffScratch cutoff;
};

// One row, and what its logits become before the pick.
struct PickRow {
  const AdjustAndPickArgs& args;
  int64_t row;
  int count;  // in [0, K]

  __device__ int32_t id(int i) const { return args.candidate_ids[row * args.candidate_ids_row_stride + i]; }

  // Repetition penalty and temperature.
  __device__ float process(float logit, int i) const {
    const float penalty = args.repetition_penalty[row], temperature = args.temperature[row];
    if (args.seen != nullptr && args.seen[row * args.seen_row_stride + i] != 0) {
      logit = logit > 0.0f ? __fdiv_rn(logit, penalty) : __fmul_rn(logit, penalty);
    }
    return temperature > 0.0f ? __fdiv_rn(logit, temperature) : logit;
  }

  __device__ float gumbel(int32_t id) const {
    const PhiloxCounter counter = {{static_cast<uint32_t>(id), static_cast<uint32_t>(args.step[row]),
                                    static_cast<uint32_t>(args.sample_index[row]),
                                    static_cast<uint32_t>(args.request_id[row])}};
    return gumbel_from_word(philox(counter, static_cast<uint64_t>(args.seed[row])).words[0]);
  }
};

// exp(x - top) in fixed point.
__device__ Word mass(float x, float top) {
  const float weight = x == top ? 1.0f : expf(x - top);  // both may have overflowed to infinity
  return static_cast<Word>(weight * kMassOfTop);
}

// The tokens of a row that top-k, top-p and min-p leave.
struct Survivors {
  Word cutoff;      // of their keys; 0 for none
  float min_logit;  // -inf for none
  bool with_mass;   // tokens of no mass are out
  float top;

  __device__ bool operator()(float x, int32_t id) const {
    if (!(x >= min_logit)) return false;  // NaN, too
    return rank_key(x, id) >= cutoff && !(with_mass && mass(x, top) == 0);
  }
};

// `logits` are those of the row, processed in the function.
__device__ Survivors find_survivors(const PickRow& r, const float* logits, float top, PickScratch& scratch) {
  const int32_t top_k = r.args.top_k[r.row];
  const float top_p = r.args.top_p[r.row], log_min_p = r.args.log_min_p[r.row];
  Survivors survivors = {0, log_min_p > -kInfinity ? __fadd_rn(top, log_min_p) : -kInfinity, top_p < 1.0f, top};
  const auto visit = [&](const auto& body) {
    for (int i = threadIdx.x; i < r.count; i += blockDim.x) {
      const float x = r.process(logits[i], i);
      if (x >= -FLT_MAX) body(rank_key(x, r.id(i)), x);
    }
  };
  if (top_k > 0 && top_k < r.count) {
    const auto count = [&](const auto& body) { visit([&](Word key, float) { body(key, Word{1}); }); };
    survivors.cutoff = find_cutoff(count, static_cast<Word>(top_k), scratch.cutoff);
  }
  if (!survivors.with_mass) return survivors;
  const auto weigh = [&](const auto& body) {
    visit([&](Word key, float x) {
      if (key >= survivors.cutoff) body(key, mass(x, top));
    });
  };
  Word total = 0;
  weigh([&](Word, Word weight) { total += weight; });
  total = reduce_block(total, Word{0}, Sum(), scratch.reduce);
  // A token stays if the mass before it is less than top_p; the first always does.
  const double target = ceil(static_cast<double>(top_p) * static_cast<double>(total));
  survivors.cutoff = find_cutoff(weigh, static_cast<Word>(fmax(target, 1.0)), scratch.cutoff);
  return survivors;
}

// Index of the largest logit, ties to the lowest id; -1 if all are NaN.
__device__ int pick_greedy(const PickRow& r, const float* logits, float top, PickScratch& scratch) {
  constexpr Word kNone = ~Word{0};
  Word first = kNone;  // by id, then index
  for (int i = threadIdx.x; i < r.count; i += blockDim.x) {
    if (!(r.process(logits[i], i) >= top)) continue;
    const Word entry = static_cast<Word>(static_cast<uint32_t>(r.id(i)) ^ 0x80000000u) << 32 | static_cast<uint32_t>(i);
    first = Min()(first, entry);
  }
  first = reduce_block(first, kNone, Min(), scratch.reduce);
  return first == kNone ? -1 : static_cast<int>(static_cast<uint32_t>(first));
}

// Index of the largest logit plus noise among the survivors, ties to the lowest id; -1 if there are none.
__device__ int pick_sampled(const PickRow& r, const float* logits, float top, PickScratch& scratch) {
  const Survivors survives = find_survivors(r, logits, top, scratch);
  Word best = 0;
  int best_index = -1;
  // The first in rank survives, if any token does. Rounding is monotone, so a token below another even with the bound
  // added cannot win.
  float to_beat = __fadd_rn(top, kGumbelFloor);
  for (int i = threadIdx.x; i < r.count; i += blockDim.x) {
    const float x = r.process(logits[i], i);
    const int32_t id = r.id(i);
    if (!(__fadd_rn(x, kGumbelBound) >= to_beat) || !survives(x, id)) continue;
    const float value = __fadd_rn(x, r.gumbel(id));
    const Word key = rank_key(value, id);
    if (key <= best) continue;
    best = key;
    best_index = i;
    to_beat = fmaxf(to_beat, value);
  }
  const Word winner = reduce_block(best, Word{0}, Max(), scratch.reduce);
  if (winner == 0) return -1;
  const Word index = best == winner ? static_cast<Word>(best_index) : ~Word{0};
  return static_cast<int>(reduce_block(index, ~Word{0}, Min(), scratch.reduce));
}

__device__ int pick(const PickRow& r, const float* logits, PickScratch& scratch) {
  float top = -kInfinity;
  for (int i = threadIdx.x; i < r.count; i += blockDim.x) top = fmaxf(top, r.process(logits[i], i));
  top = reduce_block(top, -kInfinity, Max(), scratch.reduce);
  // Processors never drop the first in rank, so greedy rows need none of them.
  return r.args.temperature[r.row] > 0.0f ? pick_sampled(r, logits, top, scratch)
                                          : pick_greedy(r, logits, top, scratch);
}

// Fills the row of `adjusted` [K]; returns the statistics of its first `count`.
__device__ Stats adjust(const PickRow& r, const float* logits, bool scored, float* adjusted, PickScratch& scratch) {
  const AdjustAndPickArgs& args = r.args;
  Stats stats = kNoLogits;
  for (int i = threadIdx.x; i < args.max_candidates; i += blockDim.x) {
    float z = i < r.count ? logits[i] : -kInfinity;
    // Two roundings, as in the reference: ties and thresholds are compared exactly.
    if (scored && i < r.count) {
      z = __fadd_rn(z, __fmul_rn(args.beta[r.row], args.scores[r.row * args.scores_row_stride + i]));
    }
    adjusted[i] = z;
    if (i < r.count) stats = Union()(stats, {z, isnan(z) ? z : 1.0f});
  }
  return reduce_block(stats, kNoLogits, Union(), scratch.reduce);
}

__global__ void __launch_bounds__(kMaxThreads) pick_rows(const __grid_constant__ AdjustAndPickArgs args) {
  __shared__ PickScratch scratch;
  const int64_t row = blockIdx.x;
  const int32_t given = args.count[row];
  const PickRow r = {args, row,
                     given < 0 ? 0 : static_cast<int>(given < args.max_candidates ? given : args.max_candidates)};
  const float* logits = args.candidate_logits + row * args.candidate_logits_row_stride;
  float* adjusted = args.adjusted + row * args.max_candidates;
  const bool scored = args.scores != nullptr && given > 1;
  const Stats stats = adjust(r, logits, scored, adjusted, scratch);
  const int index = stats.usable() ? pick(r, adjusted, scratch) : -1;
  // Where the scores do not count, System 1 picks the same.
  const int system1_index = index >= 0 && scored ? pick(r, logits, scratch) : index;
  if (threadIdx.x != 0) return;
  const bool decided = index >= 0;  // else processors made every logit NaN
  args.index[row] = index;
  args.token[row] = decided ? r.id(index) : -1;
  args.logprob[row] = decided ? adjusted[index] - stats.logsumexp() : __int_as_float(0x7fc00000);
  args.system1_index[row] = system1_index;
  args.finished[row] = decided && is_eos(args, row, r.id(index));
}

}  // namespace

void adjust_and_pick(const AdjustAndPickArgs& args, int64_t batch, void* stream) {
  const int64_t threads = (args.max_candidates + 31) / 32 * 32;
  launch(pick_rows, batch, static_cast<int>(threads < kMaxThreads ? threads : kMaxThreads), stream, args);
}

}  // namespace cuda
}  // namespace llm2_fast
