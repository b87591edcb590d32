// The ops of llm2_fast on the CPU. Their definition is llm2_fast/reference.py; names and shapes are the same here.
//
// The functions know pointers, shapes and strides, nothing of Python or torch. They trust their arguments: the caller
// has checked shapes, index ranges and that outputs overlap nothing. The caller owns every buffer. Strides count
// elements; where no stride is given, the dimension is contiguous. Every call works on the rows [begin, end) only, and
// a row's result does not depend on that range, so that ranges can go to different threads; with `num_threads` they do.
#pragma once

#include <cstdint>

#include "llm2_fast/dtype.h"
#include "llm2_fast/isa.h"

namespace llm2_fast {

struct RowRange {
  int64_t begin;
  int64_t end;
};

struct SelectCandidatesArgs {
  int64_t vocab_size;      // V >= 1
  int64_t max_candidates;  // K >= 1

  DType dtype;         // of `logits`
  const void* logits;  // [B, V]
  int64_t logits_row_stride;
  const float* log_alpha;          // [B]
  const int32_t* candidate_top_k;  // [B], 0 for no limit

  int32_t* ids;             // [B, K], -1 past the count
  float* candidate_logits;  // [B, K], -inf past the count
  int32_t* count;           // [B], 0 marks an unusable row
  float* logsumexp;         // [B], natural log, over the vocabulary; NaN in an unusable row
  bool* cut;                // [B]
};

// The plausible set of each row (LLM2, equation 1), ordered by (logit descending, id ascending). On one thread uses no
// heap memory; on several throws std::bad_alloc.
void select_candidates(const SelectCandidatesArgs& args, RowRange rows, Isa isa, int num_threads = 1);

struct AdjustAndPickArgs {
  int64_t max_candidates;  // K >= 1; the whole vocabulary in plain decoding
  int64_t num_eos;         // E >= 0

  const int32_t* candidate_ids;  // [B, K]
  int64_t candidate_ids_row_stride;
  const float* candidate_logits;  // [B, K]
  int64_t candidate_logits_row_stride;
  const int32_t* count;  // [B]
  const float* scores;   // [B, K] or null
  int64_t scores_row_stride;
  const float* beta;  // [B]

  const uint8_t* seen;  // [B, K] or null; 0 or not 0
  int64_t seen_row_stride;
  const float* repetition_penalty;  // [B]
  const float* temperature;         // [B]
  const int32_t* top_k;             // [B], 0 for no limit
  const float* top_p;               // [B]
  const float* log_min_p;           // [B]

  const int64_t* seed;           // [B], Philox key
  const int32_t* step;           // [B], with the token id, sample index and request id: the counter
  const int32_t* sample_index;   // [B]
  const int32_t* request_id;     // [B]
  const int32_t* eos_token_ids;  // [B, E], padded with -1
  int64_t eos_token_ids_row_stride;

  int32_t* index;          // [B], -1 where the row is not decided
  int32_t* token;          // [B], -1 where the row is not decided
  float* logprob;          // [B], NaN where the row is not decided
  int32_t* system1_index;  // [B], -1 where the row is not decided
  float* adjusted;         // [B, K]
  bool* finished;          // [B]
};

LLM2_FAST_HOST_DEVICE static inline bool is_eos(const AdjustAndPickArgs& args, int64_t row, int32_t token) {
  const int32_t* eos = args.eos_token_ids + row * args.eos_token_ids_row_stride;
  for (int64_t i = 0; i < args.num_eos; ++i) {
    if (eos[i] == token) return true;
  }
  return false;
}

// Adjusted logits (LLM2, equation 3), processors and the pick. Throws std::bad_alloc.
void adjust_and_pick(const AdjustAndPickArgs& args, RowRange rows, Isa isa, int num_threads = 1);

struct BranchAttentionArgs {
  int64_t num_heads;  // a multiple of num_kv_heads
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t block_size;

  DType dtype;        // of query, caches, own keys and values, and output
  const void* query;  // [R, num_heads, head_dim]
  int64_t query_row_stride, query_head_stride;
  const void* key_cache;  // [num_blocks, num_kv_heads, block_size, head_dim]
  int64_t key_block_stride, key_head_stride, key_position_stride;
  const void* value_cache;  // [num_blocks, num_kv_heads, block_size, head_dim]
  int64_t value_block_stride, value_head_stride, value_position_stride;
  const int32_t* block_table;  // [S, max_blocks]; only entries that hold visible positions are read
  int64_t block_table_row_stride;
  const int32_t* row_sequence;       // [R], in [0, S)
  const int32_t* row_prefix_length;  // [R], at most max_blocks * block_size
  const uint8_t* row_has_own;        // [R], 0 or not 0
  const void* own_key;               // [R, num_kv_heads, head_dim], read where row_has_own
  int64_t own_key_row_stride, own_key_head_stride;
  const void* own_value;  // [R, num_kv_heads, head_dim], read where row_has_own
  int64_t own_value_row_stride, own_value_head_stride;
  float scale;
  int64_t sliding_window;  // 0 for none

  void* output;  // [R, num_heads, head_dim], contiguous
};

// First prefix position that row r sees; it sees [first_visible(args, r), row_prefix_length[r]) and perhaps itself.
static inline int64_t first_visible(const BranchAttentionArgs& args, int64_t row) {
  const int64_t position =
      args.row_has_own[row] ? args.row_prefix_length[row] : args.row_prefix_length[row] - int64_t{1};
  const int64_t start = args.sliding_window > 0 ? position - args.sliding_window + 1 : 0;
  return start > 0 ? start : 0;
}

// Attention of rows to the paged prefix of their sequence and to themselves. Consecutive rows of one sequence read it
// together. Throws std::bad_alloc.
void branch_attention(const BranchAttentionArgs& args, RowRange rows, Isa isa, int num_threads = 1);

struct CommitArgs {
  int64_t num_rows;  // R, branches of all sequences
  int64_t num_layers, num_kv_heads, head_dim, hidden_size;
  int64_t num_blocks, block_size;

  DType dtype;               // of keys, values and hidden states
  const int32_t* index;      // [B], chosen branch among those of the sequence; negative for none
  const int32_t* first_row;  // [B], row of the sequence's first branch
  const int32_t* slots;      // [B], distinct
  const void* own_key;       // [num_layers, R, num_kv_heads, head_dim]
  const void* own_value;     // [num_layers, R, num_kv_heads, head_dim]
  const void* hidden;        // [R, hidden_size], or null for none

  void* keys;                  // [num_layers, num_blocks, num_kv_heads, block_size, head_dim]
  void* values;                // as keys
  const int32_t* block_table;  // [num_slots, max_blocks]
  int64_t block_table_row_stride;
  void* hidden_states;  // [num_slots, hidden_size], or null for none
  int32_t* lengths;     // [num_slots], cached positions: where the branch goes, and one more afterwards
};

// Makes the chosen branch of each sequence the last token of its slot.
void commit(const CommitArgs& args, RowRange sequences);

}  // namespace llm2_fast
