// The order of tokens, (logit descending, id ascending), and heaps that follow it.
#pragma once

#include <cstdint>

namespace llm2_fast {
namespace LLM2_FAST_TIER {

static inline bool ranks_before(float logit_a, int32_t id_a, float logit_b, int32_t id_b) {
  return logit_a > logit_b || (logit_a == logit_b && id_a < id_b);
}

enum class Root { kFirst, kLast };  // whether a heap has the first or the last in rank at its root

template <Root root>
static void sift_down(float* logits, int32_t* ids, int64_t size, int64_t hole) {
  const float logit = logits[hole];
  const int32_t id = ids[hole];
  // Whether (logit_a, id_a) belongs nearer to the root.
  const auto above = [](float logit_a, int32_t id_a, float logit_b, int32_t id_b) {
    return root == Root::kFirst ? ranks_before(logit_a, id_a, logit_b, id_b)
                                : ranks_before(logit_b, id_b, logit_a, id_a);
  };
  for (int64_t child = 2 * hole + 1; child < size; child = 2 * hole + 1) {
    if (child + 1 < size && above(logits[child + 1], ids[child + 1], logits[child], ids[child])) ++child;
    if (!above(logits[child], ids[child], logit, id)) break;
    logits[hole] = logits[child];
    ids[hole] = ids[child];
    hole = child;
  }
  logits[hole] = logit;
  ids[hole] = id;
}

template <Root root>
static void make_heap(float* logits, int32_t* ids, int64_t size) {
  for (int64_t hole = size / 2; hole-- > 0;) sift_down<root>(logits, ids, size, hole);
}

// Moves the root of a heap to its end and shrinks it by one.
template <Root root>
static void pop_to_end(float* logits, int32_t* ids, int64_t size) {
  const float logit = logits[0];
  const int32_t id = ids[0];
  logits[0] = logits[size - 1];
  ids[0] = ids[size - 1];
  sift_down<root>(logits, ids, size - 1, 0);
  logits[size - 1] = logit;
  ids[size - 1] = id;
}

// The first `capacity` entries in rank of all that are offered. Once full, a heap with the last in rank at its root.
struct Ranking {
  float* logits;  // [capacity], caller's
  int32_t* ids;   // [capacity], caller's
  int64_t capacity;
  int64_t size;
  bool dropped;  // an entry did not fit

  void offer(float logit, int32_t id) {
    if (size < capacity) {
      logits[size] = logit;
      ids[size] = id;
      if (++size == capacity) make_heap<Root::kLast>(logits, ids, size);
      return;
    }
    dropped = true;
    if (!ranks_before(logit, id, logits[0], ids[0])) return;
    logits[0] = logit;
    ids[0] = id;
    sift_down<Root::kLast>(logits, ids, size, 0);
  }

  // Orders the entries by rank.
  void sort() {
    if (size < capacity) make_heap<Root::kLast>(logits, ids, size);
    for (int64_t rest = size; rest > 1; --rest) pop_to_end<Root::kLast>(logits, ids, rest);
  }
};

}  // namespace LLM2_FAST_TIER
}  // namespace llm2_fast
