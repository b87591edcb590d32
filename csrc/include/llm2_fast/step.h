// Decoding steps (LLM2): propose candidates, score them, adjust and pick, commit.
#pragma once

#include <cstdint>

#include "llm2_fast/decoder.h"
#include "llm2_fast/ops.h"

namespace llm2_fast {

// The sequences of a step, B of them.
struct StepBatch {
  int64_t size;            // B
  const int32_t* slots;    // [B], distinct
  const int32_t* lengths;  // [B], cached positions
  const uint8_t* seen;     // [B, V], tokens that occur in the sequence, or null; read where repetition is penalized
  SelectCandidatesArgs select;  // options, outputs and `vocab_size`: the ids that can be chosen are those below it
  AdjustAndPickArgs pick;       // options and outputs; the step fills in candidates, scores and `seen`
  float* scores;                // [B, K]; -inf past the count
};

// Runs the pending tokens of the slots, if there are any, and selects the candidates of the next token of each.
// Throws std::bad_alloc.
void propose(Decoder& decoder, const PagedCache& cache, const DecoderRows& pending, StepBatch& batch, int num_threads);

// Step without a verifier: `pending`, then the pick among the whole vocabulary. K of the pick is V, and of its
// `adjusted` only the chosen one is sure to be written; K of the selection is 1. Throws std::bad_alloc.
void plain_step(Decoder& decoder, const PagedCache& cache, const DecoderRows& pending, StepBatch& batch,
                int num_threads);

// The adapted twins of a joint step's branches, which a `lora` verifier scores.
struct AdaptedBranches {
  PagedCache cache;
  const int32_t* slots;  // [B], of that cache
};

// Joint look-ahead step: one pass over all branches scores them and, for the chosen one, gives what the next step's
// logits need; its keys and values are committed at position `lengths`. With `adapted`, the same pass runs every branch
// a second time with the low-rank updates, which gives the scores, and commits the chosen twin. Throws std::bad_alloc.
void joint_step(Decoder& decoder, const PagedCache& cache, const ScoreHead& head, const AdaptedBranches* adapted,
                StepBatch& batch, int num_threads);

}  // namespace llm2_fast
