/* llm2_fast in C: the ops and the decoder behind LLM2 decoding (arXiv 2412.20372), for stacks without Python.
 *
 * Functions return a status. When it is not LLM2_FAST_OK, llm2_fast_last_error() says what is wrong, and nothing was
 * computed unless the status is LLM2_FAST_OUT_OF_MEMORY or LLM2_FAST_INTERNAL_ERROR. No exception leaves the library.
 *
 * Structs begin with their size, which the caller sets, and all other fields start as zero:
 *
 *     llm2_fast_joint_step step = {.struct_size = sizeof(step), .batch_size = 1};            // C
 *     llm2_fast_joint_step step{}; step.struct_size = sizeof(step); step.batch_size = 1;     // C++
 *
 * Later versions append fields whose zero means what this version does, so programs built against this header keep
 * working. A struct larger than the library knows is refused unless the rest is zero.
 *
 * Buffers belong to the caller. Sizes stand in brackets; row strides count elements, and a row is contiguous. Pointers
 * must lead to as many elements as the sizes say; everything else about arguments is checked. Where a size is 0,
 * pointers to it may be null. Flags given to the library are bytes, 0 or not 0.
 *
 * All functions may be called from any thread. Calls on one decoder take turns; a builder belongs to one thread at a
 * time. `num_threads` counts the caller's thread; the others are kept between calls and shared by all callers. Results
 * do not depend on it.
 */
#ifndef LLM2_FAST_LLM2_FAST_H_
#define LLM2_FAST_LLM2_FAST_H_

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define LLM2_FAST_API __attribute__((visibility("default")))
#else
#define LLM2_FAST_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* --- status ------------------------------------------------------------------------------------------------------- */

typedef int32_t llm2_fast_status;
enum {
  LLM2_FAST_OK = 0,
  LLM2_FAST_INVALID_ARGUMENT = 1, /* the message is "name: expected ..., got ..." */
  LLM2_FAST_OUT_OF_MEMORY = 2,
  LLM2_FAST_INTERNAL_ERROR = 3, /* anything else, such as threads or kernels that cannot be started */
  LLM2_FAST_UNAVAILABLE = 4     /* the library was built without what the function needs */
};

/* Message of the last call on this thread that failed; empty if none has. Valid until the next one fails. */
LLM2_FAST_API const char* llm2_fast_last_error(void);

/* "major.minor.patch" of the library. */
LLM2_FAST_API const char* llm2_fast_version(void);

/* Instruction-set tier of the CPU functions: "portable", "avx2", "avx512" or "avx512_bf16". The environment variable
 * LLM2_FAST_CPU_ISA sets it; one that cannot run here is refused by every function that computes. */
LLM2_FAST_API llm2_fast_status llm2_fast_cpu_isa(const char** name);

typedef int32_t llm2_fast_dtype;
enum { LLM2_FAST_FLOAT32 = 1, LLM2_FAST_BFLOAT16 = 2, LLM2_FAST_FLOAT16 = 3 /* on the GPU only */ };

/* --- ops ---------------------------------------------------------------------------------------------------------- */

typedef struct llm2_fast_select_candidates_args {
  size_t struct_size;
  int64_t batch_size;     /* B */
  int64_t vocab_size;     /* V in [1, 2^31) */
  int64_t max_candidates; /* K in [1, 2^31) */

  llm2_fast_dtype dtype;          /* of `logits` */
  const void* logits;             /* [B, V] */
  int64_t logits_row_stride;      /* >= V */
  const float* log_alpha;         /* [B], ln(alpha); -inf turns the constraint off */
  const int32_t* candidate_top_k; /* [B], 0 for no limit */

  int32_t* ids;            /* [B, K] out, -1 past the count */
  float* candidate_logits; /* [B, K] out, -inf past the count */
  int32_t* count;          /* [B] out; 0 marks an unusable row: it has a NaN, or its maximum is not finite */
  float* logsumexp;        /* [B] out, natural log, over the vocabulary; NaN in an unusable row */
  bool* cut;               /* [B] out; max_candidates dropped plausible tokens */
} llm2_fast_select_candidates_args;

/* The plausible tokens of each row, C = {v : z_v >= max z + ln(alpha)} (equation 1), in order of (logit descending, id
 * ascending). Tokens whose logit is -inf are never candidates. */
LLM2_FAST_API llm2_fast_status llm2_fast_select_candidates(const llm2_fast_select_candidates_args* args,
                                                           int32_t num_threads);

typedef struct llm2_fast_adjust_and_pick_args {
  size_t struct_size;
  int64_t batch_size;     /* B */
  int64_t max_candidates; /* K in [1, 2^31); the vocabulary in plain decoding */
  int64_t num_eos;        /* E >= 0 */

  const int32_t* candidate_ids;        /* [B, K] */
  int64_t candidate_ids_row_stride;    /* >= K, or 0 for one row that serves all */
  const float* candidate_logits;       /* [B, K] */
  int64_t candidate_logits_row_stride; /* >= K */
  const int32_t* count;                /* [B]; entries past it are ignored */
  const float* scores;                 /* [B, K], or null for none */
  int64_t scores_row_stride;           /* >= K */
  const float* beta;                   /* [B] */

  const uint8_t* seen;             /* [B, K], tokens that occur in the sequence; or null for none */
  int64_t seen_row_stride;         /* >= K */
  const float* repetition_penalty; /* [B], 1 for none */
  const float* temperature;        /* [B], 0 for greedy */
  const int32_t* top_k;            /* [B], 0 for no limit */
  const float* top_p;              /* [B], 1 for no limit */
  const float* log_min_p;          /* [B], ln(min_p); -inf for no limit */

  const int64_t* seed;              /* [B], Philox key */
  const int32_t* step;              /* [B]; with the token id, sample index and request id: the random counter */
  const int32_t* sample_index;      /* [B] */
  const int32_t* request_id;        /* [B] */
  const int32_t* eos_token_ids;     /* [B, E], padded with -1 */
  int64_t eos_token_ids_row_stride; /* >= E, or 0 for one row that serves all */

  int32_t* index;         /* [B] out, the chosen candidate; -1 where the row is not decided */
  int32_t* token;         /* [B] out, -1 where the row is not decided */
  float* logprob;         /* [B] out, log-softmax of `adjusted`; NaN where the row is not decided */
  int32_t* system1_index; /* [B] out, what beta = 0 would have chosen; -1 where the row is not decided */
  float* adjusted;        /* [B, K] out, z + beta * s, -inf past the count */
  bool* finished;         /* [B] out; the token is one of eos_token_ids */
} llm2_fast_adjust_and_pick_args;

/* Adjusted logits z* = z + beta * s (equation 3); repetition penalty, temperature, top-k, top-p and min-p; argmax z*,
 * or argmax (z* / T + Gumbel noise). Ties go to the lowest id. A row is not decided if its count is 0, an adjusted
 * logit is NaN, or their maximum is not finite. */
LLM2_FAST_API llm2_fast_status llm2_fast_adjust_and_pick(const llm2_fast_adjust_and_pick_args* args,
                                                         int32_t num_threads);

typedef struct llm2_fast_branch_attention_args {
  size_t struct_size;
  int64_t num_rows;      /* R */
  int64_t num_sequences; /* S */
  int64_t max_blocks;    /* per sequence */
  int64_t num_heads;     /* a multiple of num_kv_heads */
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t num_blocks; /* in the caches */
  int64_t block_size; /* positions per block */

  llm2_fast_dtype dtype; /* of query, caches, own keys and values, and output */
  const void* query;     /* [R, num_heads, head_dim] */
  int64_t query_row_stride, query_head_stride;
  const void* key_cache; /* [num_blocks, num_kv_heads, block_size, head_dim] */
  int64_t key_block_stride, key_head_stride, key_position_stride;
  const void* value_cache; /* [num_blocks, num_kv_heads, block_size, head_dim] */
  int64_t value_block_stride, value_head_stride, value_position_stride;
  const int32_t* block_table; /* [S, max_blocks]; only entries that hold visible positions are read */
  int64_t block_table_row_stride;
  const int32_t* row_sequence;      /* [R], in [0, S) */
  const int32_t* row_prefix_length; /* [R] */
  const uint8_t* row_has_own;       /* [R] */
  const void* own_key;              /* [R, num_kv_heads, head_dim], read where row_has_own */
  int64_t own_key_row_stride, own_key_head_stride;
  const void* own_value; /* [R, num_kv_heads, head_dim], read where row_has_own */
  int64_t own_value_row_stride, own_value_head_stride;
  float scale;            /* on the dot products */
  int64_t sliding_window; /* 0 for none */

  void* output; /* [R, num_heads, head_dim] out, contiguous */
} llm2_fast_branch_attention_args;

/* Attention of rows to the prefix of their sequence, [0, row_prefix_length), and, where row_has_own, to themselves at
 * position row_prefix_length. Rows do not see each other. With a sliding window w, a row at position p sees positions
 * > p - w only. A row that sees nothing gives zeros. */
LLM2_FAST_API llm2_fast_status llm2_fast_branch_attention(const llm2_fast_branch_attention_args* args,
                                                          int32_t num_threads);

typedef struct llm2_fast_commit_args {
  size_t struct_size;
  int64_t batch_size; /* B */
  int64_t num_rows;   /* R, branches of all sequences */
  int64_t num_layers;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t hidden_size;
  int64_t num_blocks; /* in the cache */
  int64_t block_size; /* positions per block */
  int64_t num_slots;
  int64_t max_blocks; /* per slot */

  llm2_fast_dtype dtype;    /* of keys, values and hidden states */
  const int32_t* index;     /* [B], chosen branch among those of the sequence; negative: nothing is committed */
  const int32_t* first_row; /* [B], row of the sequence's first branch */
  const int32_t* slots;     /* [B], distinct */
  const void* own_key;      /* [num_layers, R, num_kv_heads, head_dim] */
  const void* own_value;    /* [num_layers, R, num_kv_heads, head_dim] */
  const void* hidden;       /* [R, hidden_size], or null for none */

  void* keys;                     /* [num_layers, num_blocks, num_kv_heads, block_size, head_dim] in and out */
  void* values;                   /* as keys */
  const int32_t* block_table;     /* [num_slots, max_blocks] */
  int64_t block_table_row_stride; /* >= max_blocks */
  void* hidden_states;            /* [num_slots, hidden_size] in and out, or null for none */
  int32_t* lengths; /* [num_slots] in and out, cached positions: where the branch goes, and one more afterwards */
} llm2_fast_commit_args;

/* Makes the chosen branch of each sequence the last token of its slot: copies its keys and values to the next position,
 * and its hidden state. All tensors are contiguous. llm2_fast_decoder_joint_step does this itself. */
LLM2_FAST_API llm2_fast_status llm2_fast_commit(const llm2_fast_commit_args* args);

/* --- ops on the GPU ----------------------------------------------------------------------------------------------- */

/* The ops above on device memory, with the same arguments and results, on the current device. `stream` is a
 * cudaStream_t. The calls queue kernels, allocate nothing and wait for nothing, so a CUDA graph can hold them. Sizes,
 * strides and alignment are checked; what lies in device memory is trusted, indices and lengths too. logits may be
 * float16 as well. In a library built without CUDA they return LLM2_FAST_UNAVAILABLE. */

/* Bytes that llm2_fast_cuda_select_candidates needs; of the arguments only the sizes are read. */
LLM2_FAST_API llm2_fast_status llm2_fast_cuda_select_candidates_workspace(const llm2_fast_select_candidates_args* args,
                                                                          size_t* bytes);

/* max_candidates is at most 1,024. `workspace` is aligned to 16 bytes and need not be initialized. Rows that begin at
 * multiples of 16 bytes are read faster. */
LLM2_FAST_API llm2_fast_status llm2_fast_cuda_select_candidates(const llm2_fast_select_candidates_args* args,
                                                                void* workspace, size_t workspace_bytes, void* stream);

/* max_candidates is at most 2^20. */
LLM2_FAST_API llm2_fast_status llm2_fast_cuda_adjust_and_pick(const llm2_fast_adjust_and_pick_args* args, void* stream);

LLM2_FAST_API llm2_fast_status llm2_fast_cuda_commit(const llm2_fast_commit_args* args, void* stream);

/* --- making a decoder --------------------------------------------------------------------------------------------- */

/* A decoder of the Llama family (Llama, Mistral, Qwen2, Qwen3), or a scalar head on one. */
typedef struct llm2_fast_decoder_builder llm2_fast_decoder_builder;
typedef struct llm2_fast_decoder llm2_fast_decoder;
typedef struct llm2_fast_score_head llm2_fast_score_head;

typedef struct llm2_fast_decoder_spec {
  size_t struct_size;
  llm2_fast_dtype dtype;       /* of weights, cache and the inputs of linear layers; arithmetic is float32 */
  int32_t tie_word_embeddings; /* not 0: lm_head is the embedding table */
  int64_t hidden_size;         /* even */
  int64_t intermediate_size;
  int64_t num_layers;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t vocab_size;
  float rms_norm_eps;
  float attention_scale;          /* on the dot products; usually 1 / sqrt(head_dim) */
  float rope_scale;               /* on cosines and sines; usually 1 */
  const float* inv_freq;          /* [head_dim / 2], rotary frequencies; usually rope_theta^(-2 i / head_dim) */
  const int64_t* sliding_windows; /* [num_layers], 0 for none; null for none at all */
} llm2_fast_decoder_spec;

LLM2_FAST_API llm2_fast_status llm2_fast_decoder_builder_create(const llm2_fast_decoder_spec* spec,
                                                                llm2_fast_decoder_builder** builder);

/* Gives the builder a tensor under the name that it has in a Hugging Face checkpoint, in any order:
 *
 *     model.embed_tokens.weight                                  [vocab_size, hidden_size]
 *     model.layers.N.input_layernorm.weight                      [hidden_size]
 *     model.layers.N.self_attn.q_proj.weight, .bias              [num_heads * head_dim, hidden_size], [...]
 *     model.layers.N.self_attn.k_proj.weight, .bias              [num_kv_heads * head_dim, hidden_size], [...]
 *     model.layers.N.self_attn.v_proj.weight, .bias              [num_kv_heads * head_dim, hidden_size], [...]
 *     model.layers.N.self_attn.o_proj.weight, .bias              [hidden_size, num_heads * head_dim], [...]
 *     model.layers.N.self_attn.q_norm.weight, k_norm.weight      [head_dim]
 *     model.layers.N.post_attention_layernorm.weight             [hidden_size]
 *     model.layers.N.mlp.gate_proj.weight, up_proj.weight, .bias [intermediate_size, hidden_size], [...]
 *     model.layers.N.mlp.down_proj.weight, .bias                 [hidden_size, intermediate_size], [...]
 *     model.norm.weight                                          [hidden_size]
 *     lm_head.weight                                             [vocab_size, hidden_size]
 *
 * Biases and norms of queries and keys are optional: all layers have the same. Without lm_head.weight and tied
 * embeddings the decoder can score but not propose. Every other name is refused, and so is a second tensor of a name.
 *
 * `data` is contiguous, of either dtype whatever the decoder's, and read during the call only. */
LLM2_FAST_API llm2_fast_status llm2_fast_decoder_builder_add(llm2_fast_decoder_builder* builder, const char* name,
                                                             llm2_fast_dtype dtype, const int64_t* shape, int32_t ndim,
                                                             const void* data);

/* Makes the decoder and takes the tensors out of the builder, which can only be destroyed then. If a tensor is missing,
 * the builder is as before. */
LLM2_FAST_API llm2_fast_status llm2_fast_decoder_builder_finish(llm2_fast_decoder_builder* builder, int32_t num_threads,
                                                                llm2_fast_decoder** decoder);

/* These three accept null. Nobody may use the handle any more. */
LLM2_FAST_API void llm2_fast_decoder_builder_destroy(llm2_fast_decoder_builder* builder);
LLM2_FAST_API void llm2_fast_decoder_destroy(llm2_fast_decoder* decoder);
LLM2_FAST_API void llm2_fast_score_head_destroy(llm2_fast_score_head* head);

#define LLM2_FAST_FINAL_LAYER (-1) /* the output of the final norm */

/* score . x + score_bias, or score . silu(dense x + dense_bias) + score_bias, of the hidden states after `layers`,
 * concatenated. The weights are copied. */
typedef struct llm2_fast_score_head_spec {
  size_t struct_size;
  int64_t hidden_size;   /* of the decoder */
  int64_t num_layers;    /* L >= 1, layers that are read */
  const int64_t* layers; /* [L], LLM2_FAST_FINAL_LAYER or an index below that of the last layer */
  int64_t mlp_size;      /* M, 0 without a hidden layer */
  float score_bias;
  const float* dense_weight; /* [M, L * hidden_size], or null without a hidden layer; so is dense_bias */
  const float* dense_bias;   /* [M] */
  const float* score_weight; /* [M], or [L * hidden_size] without a hidden layer */
} llm2_fast_score_head_spec;

LLM2_FAST_API llm2_fast_status llm2_fast_score_head_create(const llm2_fast_score_head_spec* spec,
                                                           llm2_fast_score_head** head);

/* --- decoding ----------------------------------------------------------------------------------------------------- */

/* The caller's storage: keys and values of the committed tokens of each slot, and the final hidden state of its last
 * token, from which the next token's logits come. A slot holds a sequence. Position p of slot s lies in block
 * block_table[s][p / block_size]; slots may share blocks that none of them writes to any more. */
typedef struct llm2_fast_paged_cache {
  size_t struct_size;
  int64_t num_blocks;
  int64_t block_size;
  int64_t num_slots;
  int64_t max_blocks;         /* per slot */
  void* keys;                 /* [num_layers, num_blocks, num_kv_heads, block_size, head_dim] of the decoder's dtype */
  void* values;               /* as keys */
  const int32_t* block_table; /* [num_slots, max_blocks] */
  int64_t block_table_row_stride; /* >= max_blocks */
  void* hidden_states;            /* [num_slots, hidden_size] of the decoder's dtype */
} llm2_fast_paged_cache;

/* Rows of one pass: tokens at positions. Each sees the positions of its slot before its own, and itself. Rows that are
 * `stored` extend the slot's prefix: they are cached first, so the rows after them see them. The others are branches,
 * which see no other row. The rows of a slot are consecutive, its stored rows in the order of positions. */
typedef struct llm2_fast_rows {
  size_t struct_size;
  int64_t count;            /* R */
  const int32_t* token_ids; /* [R] */
  const int32_t* slots;     /* [R] */
  const int32_t* positions; /* [R] */
  const uint8_t* stored;    /* [R] */
} llm2_fast_rows;

/* One pass over the weights. With a head, `scores` [R] receives the scores; both may be null. */
LLM2_FAST_API llm2_fast_status llm2_fast_decoder_forward(llm2_fast_decoder* decoder, const llm2_fast_paged_cache* cache,
                                                         const llm2_fast_rows* rows, const llm2_fast_score_head* head,
                                                         float* scores, int32_t num_threads);

/* Makes a row of the last pass the last token of its slot: keeps its final hidden state and, if it is a branch, caches
 * its keys and values. Only after llm2_fast_decoder_forward and before any other pass, also of another thread. */
LLM2_FAST_API llm2_fast_status llm2_fast_decoder_keep_row(llm2_fast_decoder* decoder,
                                                          const llm2_fast_paged_cache* cache, int64_t row);

/* Runs `pending`, all of them stored rows, keeps the last row of each slot, and selects candidates of the next token.
 *
 * slots: [B], distinct, B = select->batch_size.
 * select: Options and outputs. `logits` must be null; `vocab_size` says below what ids are chosen, 0 for all. */
LLM2_FAST_API llm2_fast_status llm2_fast_decoder_propose(llm2_fast_decoder* decoder, const llm2_fast_paged_cache* cache,
                                                         const llm2_fast_rows* pending, const int32_t* slots,
                                                         const llm2_fast_select_candidates_args* select,
                                                         int32_t num_threads);

/* Step without a verifier: runs `pending` as llm2_fast_decoder_propose does, then picks among the whole vocabulary.
 *
 * slots: [B], distinct, B = pick->batch_size.
 * pick: Options and outputs, with K = vocab_size. What describes candidates must be null: candidate_ids,
 *     candidate_logits, count and scores. Of `adjusted` only the element of the choice is sure to be written. */
LLM2_FAST_API llm2_fast_status llm2_fast_decoder_plain_step(llm2_fast_decoder* decoder,
                                                            const llm2_fast_paged_cache* cache,
                                                            const llm2_fast_rows* pending, const int32_t* slots,
                                                            const llm2_fast_adjust_and_pick_args* pick,
                                                            int32_t num_threads);

/* Options and outputs of a step with a verifier. */
typedef struct llm2_fast_joint_step {
  size_t struct_size;
  int64_t batch_size;     /* B, also of select and pick */
  const int32_t* slots;   /* [B], distinct */
  const int32_t* lengths; /* [B], committed positions of each */
  const uint8_t* seen;    /* [B, vocab_size], tokens that occur in the sequence; or null for none */
  const llm2_fast_select_candidates_args* select; /* as in llm2_fast_decoder_propose */
  const llm2_fast_adjust_and_pick_args* pick; /* as in llm2_fast_decoder_plain_step, but K is select's; `seen` null */
  float* scores;                              /* [B, K] out, -inf past the count */
} llm2_fast_joint_step;

/* Joint look-ahead step: one pass over all candidates scores them and, for the chosen one, computes what the next
 * step's logits come from. The chosen token is committed at position `lengths`, for which the slot needs a block; in a
 * row that is not decided, nothing is. */
LLM2_FAST_API llm2_fast_status llm2_fast_decoder_joint_step(llm2_fast_decoder* decoder,
                                                            const llm2_fast_paged_cache* cache,
                                                            const llm2_fast_score_head* head,
                                                            const llm2_fast_joint_step* step, int32_t num_threads);

#ifdef __cplusplus
}
#endif

#endif /* LLM2_FAST_LLM2_FAST_H_ */
