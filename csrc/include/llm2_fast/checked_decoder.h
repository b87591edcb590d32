// A decoder for callers that are not trusted: it checks what it is given before anything is computed, and calls from
// several threads take turns.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

#include "llm2_fast/decoder.h"
#include "llm2_fast/step.h"

namespace llm2_fast {

// The functions have the meaning of those of Decoder and step.h, and throw std::invalid_argument besides. What a check
// cannot see is trusted: that pointers lead to as many elements as the sizes say, and that slots of a step are
// distinct.
class CheckedDecoder {
 public:
  CheckedDecoder(DecoderWeights weights, Isa isa);

  const DecoderWeights& weights() const { return decoder_.weights(); }
  const DecoderSpec& spec() const { return decoder_.spec(); }

  // Of rows in one cache.
  void forward(const PagedCache& cache, const DecoderRows& rows, const ScoreHead* head, float* scores, int num_threads);
  // A branch can be kept as long as no other pass was made.
  void keep_row(const PagedCache& cache, int64_t row);

  void propose(const PagedCache& cache, const DecoderRows& pending, StepBatch batch, int num_threads);
  void plain_step(const PagedCache& cache, const DecoderRows& pending, StepBatch batch, int num_threads);
  void joint_step(const PagedCache& cache, const ScoreHead& head, const AdaptedBranches* adapted, StepBatch batch,
                  int num_threads);

 private:
  void check_step(const PagedCache& cache, const StepBatch& batch, int num_threads) const;

  Decoder decoder_;
  std::mutex mutex_;
  std::vector<int32_t> slots_, positions_;  // of the rows of the last pass, while they can be kept
};

}  // namespace llm2_fast
