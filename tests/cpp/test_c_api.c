/* The C API from C: decoding gives the bits of the C++ core, and bad arguments are refused by name. Exits with 1 if a
 * check fails. */
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core_twin.h"
#include "llm2_fast/llm2_fast.h"

static int failures = 0;
static const char* current_case = "";

#define CHECK(condition)                                                                 \
  do {                                                                                   \
    if (!(condition)) {                                                                  \
      printf("%s:%d: failed on %s: %s\n", __FILE__, __LINE__, current_case, #condition); \
      ++failures;                                                                        \
    }                                                                                    \
  } while (0)

/* A call that must succeed. */
#define OK(call)                                                                                     \
  do {                                                                                               \
    if ((call) != LLM2_FAST_OK) {                                                                    \
      printf("%s:%d: failed on %s: %s\n", __FILE__, __LINE__, current_case, llm2_fast_last_error()); \
      ++failures;                                                                                    \
    }                                                                                                \
  } while (0)

/* A call that must be refused with this message. */
#define REFUSED(call, message)                                                                        \
  do {                                                                                                \
    const llm2_fast_status status = (call);                                                           \
    if (status != LLM2_FAST_INVALID_ARGUMENT || strcmp(llm2_fast_last_error(), message) != 0) {       \
      printf("%s:%d: status %d, expected '%s', got '%s'\n", __FILE__, __LINE__, (int)status, message, \
             llm2_fast_last_error());                                                                 \
      ++failures;                                                                                     \
    }                                                                                                 \
  } while (0)

/* A struct must not end in padding, which a later version would take for its next field. */
#define ENDS_WITH(type, field) \
  _Static_assert(offsetof(type, field) + sizeof(((type*)0)->field) == sizeof(type), #type " ends in padding")
ENDS_WITH(llm2_fast_select_candidates_args, cut);
ENDS_WITH(llm2_fast_adjust_and_pick_args, finished);
ENDS_WITH(llm2_fast_branch_attention_args, output);
ENDS_WITH(llm2_fast_commit_args, lengths);
ENDS_WITH(llm2_fast_decoder_spec, sliding_windows);
ENDS_WITH(llm2_fast_score_head_spec, score_weight);
ENDS_WITH(llm2_fast_paged_cache, hidden_states);
ENDS_WITH(llm2_fast_rows, stored);
ENDS_WITH(llm2_fast_joint_step, scores);

/* --- the tiny decoder --------------------------------------------------------------------------------------------- */

static llm2_fast_decoder_spec spec_of(const model_kind* kind) {
  const llm2_fast_decoder_spec spec = {.struct_size = sizeof(spec),
                                       .dtype = kind->bfloat16 ? LLM2_FAST_BFLOAT16 : LLM2_FAST_FLOAT32,
                                       .tie_word_embeddings = kind->tied,
                                       .hidden_size = HIDDEN,
                                       .intermediate_size = INNER,
                                       .num_layers = LAYERS,
                                       .num_heads = HEADS,
                                       .num_kv_heads = KV_HEADS,
                                       .head_dim = HEAD_DIM,
                                       .vocab_size = VOCAB,
                                       .rms_norm_eps = kRmsNormEps,
                                       .attention_scale = kAttentionScale,
                                       .rope_scale = 1.0f,
                                       .inv_freq = kInvFreq,
                                       .sliding_windows = kWindows};
  return spec;
}

static llm2_fast_status add_tensor(llm2_fast_decoder_builder* builder, const char* name, int64_t rows,
                                   int64_t columns) {
  const int64_t size = rows * (columns > 0 ? columns : 1), shape[2] = {rows, columns};
  float* data = malloc((size_t)size * sizeof(float));
  for (int64_t i = 0; i < size; ++i) data[i] = tensor_element(name, i);
  const llm2_fast_status status =
      llm2_fast_decoder_builder_add(builder, name, LLM2_FAST_FLOAT32, shape, columns > 0 ? 2 : 1, data);
  free(data);
  return status;
}

static void add_layer(llm2_fast_decoder_builder* builder, const model_kind* kind, int layer) {
  char name[96];
  const struct {
    const char* module;
    int64_t out_features, in_features;
  } linears[] = {{"self_attn.q_proj", HEADS * HEAD_DIM, HIDDEN},
                 {"self_attn.k_proj", KV_HEADS * HEAD_DIM, HIDDEN},
                 {"self_attn.v_proj", KV_HEADS * HEAD_DIM, HIDDEN},
                 {"self_attn.o_proj", HIDDEN, HEADS * HEAD_DIM},
                 {"mlp.gate_proj", INNER, HIDDEN},
                 {"mlp.up_proj", INNER, HIDDEN},
                 {"mlp.down_proj", HIDDEN, INNER}};
  for (size_t i = 0; i < sizeof(linears) / sizeof(linears[0]); ++i) {
    snprintf(name, sizeof(name), "model.layers.%d.%s.weight", layer, linears[i].module);
    OK(add_tensor(builder, name, linears[i].out_features, linears[i].in_features));
    if (!kind->bias) continue;
    snprintf(name, sizeof(name), "model.layers.%d.%s.bias", layer, linears[i].module);
    OK(add_tensor(builder, name, linears[i].out_features, 0));
  }
  const char* norms[] = {"input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"};
  for (int i = 0; i < (kind->qk_norm ? 4 : 2); ++i) {
    snprintf(name, sizeof(name), "model.layers.%d.%s.weight", layer, norms[i]);
    OK(add_tensor(builder, name, i < 2 ? HIDDEN : HEAD_DIM, 0));
  }
}

/* All tensors but, if `lm_head` is 0, the output layer. */
static llm2_fast_decoder_builder* filled_builder(const model_kind* kind, int lm_head) {
  const llm2_fast_decoder_spec spec = spec_of(kind);
  llm2_fast_decoder_builder* builder = NULL;
  OK(llm2_fast_decoder_builder_create(&spec, &builder));
  OK(add_tensor(builder, "model.norm.weight", HIDDEN, 0));
  for (int layer = LAYERS - 1; layer >= 0; --layer) add_layer(builder, kind, layer);
  if (!kind->tied && lm_head) OK(add_tensor(builder, "lm_head.weight", VOCAB, HIDDEN));
  OK(add_tensor(builder, "model.embed_tokens.weight", VOCAB, HIDDEN));
  return builder;
}

static llm2_fast_decoder* make_decoder(const model_kind* kind, int lm_head) {
  llm2_fast_decoder_builder* builder = filled_builder(kind, lm_head);
  llm2_fast_decoder* decoder = NULL;
  OK(llm2_fast_decoder_builder_finish(builder, 2, &decoder));
  llm2_fast_decoder_builder_destroy(builder);
  return decoder;
}

static llm2_fast_score_head* make_head(int mlp) {
  float dense[MLP * 2 * HIDDEN], dense_bias[MLP], score[2 * HIDDEN];
  for (int i = 0; i < MLP * 2 * HIDDEN; ++i) dense[i] = tensor_element("dense.weight", i);
  for (int i = 0; i < MLP; ++i) dense_bias[i] = tensor_element("dense.bias", i);
  for (int i = 0; i < 2 * HIDDEN; ++i) score[i] = tensor_element("score.weight", i);
  const llm2_fast_score_head_spec spec = {.struct_size = sizeof(spec),
                                          .hidden_size = HIDDEN,
                                          .num_layers = 2,
                                          .layers = kHeadLayers,
                                          .mlp_size = mlp ? MLP : 0,
                                          .score_bias = 0.25f,
                                          .dense_weight = dense,
                                          .dense_bias = dense_bias,
                                          .score_weight = score};
  llm2_fast_score_head* head = NULL;
  OK(llm2_fast_score_head_create(&spec, &head));
  return head;
}

/* A decoder's cache and the buffers of its steps. */
typedef struct {
  float keys[LAYERS * BLOCKS * KV_HEADS * BLOCK_SIZE * HEAD_DIM]; /* large enough for either dtype */
  float values[LAYERS * BLOCKS * KV_HEADS * BLOCK_SIZE * HEAD_DIM];
  float hidden_states[SLOTS * HIDDEN];
  int32_t block_table[SLOTS * MAX_BLOCKS];
  llm2_fast_paged_cache cache;

  int32_t slots[SLOTS], lengths[SLOTS], zeros[SLOTS], steps[SLOTS];
  float log_alpha[SLOTS], beta[SLOTS], ones[SLOTS], temperature[SLOTS], log_min_p[SLOTS];
  int64_t seeds[SLOTS];

  int32_t ids[SLOTS * CANDIDATES], count[SLOTS], index[SLOTS], token[SLOTS], system1_index[SLOTS];
  float candidate_logits[SLOTS * CANDIDATES], logsumexp[SLOTS], logprob[SLOTS];
  float scores[SLOTS * CANDIDATES], adjusted[SLOTS * VOCAB];
  bool cut[SLOTS], finished[SLOTS];
  llm2_fast_select_candidates_args select;
  llm2_fast_adjust_and_pick_args pick;
  llm2_fast_joint_step joint;
} workbench;

static workbench* make_workbench(void) {
  workbench* w = calloc(1, sizeof(workbench));
  for (int slot = 0; slot < SLOTS; ++slot) {
    w->slots[slot] = slot;
    w->log_alpha[slot] = kLogAlpha;
    w->beta[slot] = kBeta;
    w->ones[slot] = 1.0f;
    w->temperature[slot] = temperature_of(slot);
    w->log_min_p[slot] = -INFINITY;
    w->seeds[slot] = 7;
    for (int i = 0; i < MAX_BLOCKS; ++i) w->block_table[slot * MAX_BLOCKS + i] = block_of(slot, i);
  }
  w->cache = (llm2_fast_paged_cache){.struct_size = sizeof(w->cache),
                                     .num_blocks = BLOCKS,
                                     .block_size = BLOCK_SIZE,
                                     .num_slots = SLOTS,
                                     .max_blocks = MAX_BLOCKS,
                                     .keys = w->keys,
                                     .values = w->values,
                                     .block_table = w->block_table,
                                     .block_table_row_stride = MAX_BLOCKS,
                                     .hidden_states = w->hidden_states};
  w->select = (llm2_fast_select_candidates_args){.struct_size = sizeof(w->select),
                                                 .batch_size = SLOTS,
                                                 .max_candidates = CANDIDATES,
                                                 .log_alpha = w->log_alpha,
                                                 .candidate_top_k = w->zeros,
                                                 .ids = w->ids,
                                                 .candidate_logits = w->candidate_logits,
                                                 .count = w->count,
                                                 .logsumexp = w->logsumexp,
                                                 .cut = w->cut};
  w->pick = (llm2_fast_adjust_and_pick_args){.struct_size = sizeof(w->pick),
                                             .batch_size = SLOTS,
                                             .max_candidates = CANDIDATES,
                                             .beta = w->beta,
                                             .repetition_penalty = w->ones,
                                             .temperature = w->temperature,
                                             .top_k = w->zeros,
                                             .top_p = w->ones,
                                             .log_min_p = w->log_min_p,
                                             .seed = w->seeds,
                                             .step = w->steps,
                                             .sample_index = w->zeros,
                                             .request_id = w->slots,
                                             .index = w->index,
                                             .token = w->token,
                                             .logprob = w->logprob,
                                             .system1_index = w->system1_index,
                                             .adjusted = w->adjusted,
                                             .finished = w->finished};
  w->joint = (llm2_fast_joint_step){.struct_size = sizeof(w->joint),
                                    .batch_size = SLOTS,
                                    .slots = w->slots,
                                    .lengths = w->lengths,
                                    .select = &w->select,
                                    .pick = &w->pick,
                                    .scores = w->scores};
  return w;
}

/* Both prompts in one pass; two rows are kept. */
static void prefill(llm2_fast_decoder* decoder, const workbench* w) {
  int32_t tokens[SLOTS * PROMPT], slots[SLOTS * PROMPT], positions[SLOTS * PROMPT];
  uint8_t stored[SLOTS * PROMPT];
  for (int i = 0; i < SLOTS * PROMPT; ++i) {
    tokens[i] = kPrompt[i / PROMPT][i % PROMPT];
    slots[i] = i / PROMPT;
    positions[i] = i % PROMPT;
    stored[i] = 1;
  }
  const llm2_fast_rows rows = {.struct_size = sizeof(rows),
                               .count = SLOTS * PROMPT,
                               .token_ids = tokens,
                               .slots = slots,
                               .positions = positions,
                               .stored = stored};
  OK(llm2_fast_decoder_forward(decoder, &w->cache, &rows, NULL, NULL, 2));
  for (int slot = 0; slot < SLOTS; ++slot) {
    OK(llm2_fast_decoder_keep_row(decoder, &w->cache, (slot + 1) * PROMPT - 1));
  }
}

/* --- decoding ----------------------------------------------------------------------------------------------------- */

static void test_plain(const model_kind* kind) {
  run_record expected;
  memset(&expected, 0, sizeof(expected));
  core_plain_run(kind, &expected);

  llm2_fast_decoder* decoder = make_decoder(kind, 1);
  workbench* w = make_workbench();
  prefill(decoder, w);
  w->pick.max_candidates = VOCAB;
  for (int step = 0; step < STEPS; ++step) {
    int32_t tokens[SLOTS], positions[SLOTS];
    const uint8_t stored[SLOTS] = {1, 1};
    for (int slot = 0; slot < SLOTS; ++slot) {
      tokens[slot] = w->token[slot];
      positions[slot] = PROMPT + step - 1;
      w->steps[slot] = step;
    }
    const llm2_fast_rows pending = {.struct_size = sizeof(pending),
                                    .count = step > 0 ? SLOTS : 0,
                                    .token_ids = tokens,
                                    .slots = w->slots,
                                    .positions = positions,
                                    .stored = stored};
    OK(llm2_fast_decoder_plain_step(decoder, &w->cache, &pending, w->slots, &w->pick, 2));
    CHECK(memcmp(w->token, expected.tokens[step], sizeof(w->token)) == 0);
    CHECK(memcmp(w->logprob, expected.logprobs[step], sizeof(w->logprob)) == 0);
  }
  free(w);
  llm2_fast_decoder_destroy(decoder);
}

static void test_joint(const model_kind* kind) {
  run_record expected;
  memset(&expected, 0, sizeof(expected));
  core_joint_run(kind, &expected);

  llm2_fast_decoder* decoder = make_decoder(kind, 1);
  llm2_fast_score_head* head = make_head(kind->mlp);
  workbench* w = make_workbench();
  prefill(decoder, w);
  int ambiguous = 0, interventions = 0;
  for (int step = 0; step < STEPS; ++step) {
    for (int slot = 0; slot < SLOTS; ++slot) {
      w->lengths[slot] = PROMPT + step;
      w->steps[slot] = step;
    }
    OK(llm2_fast_decoder_joint_step(decoder, &w->cache, head, &w->joint, 2));
    CHECK(memcmp(w->token, expected.tokens[step], sizeof(w->token)) == 0);
    CHECK(memcmp(w->logprob, expected.logprobs[step], sizeof(w->logprob)) == 0);
    CHECK(memcmp(w->count, expected.counts[step], sizeof(w->count)) == 0);
    CHECK(memcmp(w->scores, expected.scores[step], sizeof(w->scores)) == 0);
    CHECK(memcmp(w->adjusted, expected.adjusted[step], sizeof(expected.adjusted[step])) == 0);
    for (int slot = 0; slot < SLOTS; ++slot) {
      ambiguous += w->count[slot] > 1;
      interventions += w->index[slot] != w->system1_index[slot];
    }
  }
  CHECK(ambiguous > STEPS && interventions > 0); /* or the steps above would show little */
  free(w);
  llm2_fast_score_head_destroy(head);
  llm2_fast_decoder_destroy(decoder);
}

/* Proposing, scoring the candidates as branches and picking among them is what a joint step does at once. */
static void test_step_by_step(void) {
  current_case = "step by step";
  const model_kind kind = {.tied = 1};
  llm2_fast_decoder* decoder = make_decoder(&kind, 1);
  llm2_fast_score_head* head = make_head(0);
  workbench *joint = make_workbench(), *w = make_workbench();
  prefill(decoder, joint);
  prefill(decoder, w);
  joint->lengths[0] = joint->lengths[1] = PROMPT;
  OK(llm2_fast_decoder_joint_step(decoder, &joint->cache, head, &joint->joint, 1));

  const llm2_fast_rows none = {.struct_size = sizeof(none)};
  OK(llm2_fast_decoder_propose(decoder, &w->cache, &none, w->slots, &w->select, 2));
  CHECK(memcmp(w->ids, joint->ids, sizeof(w->ids)) == 0);
  int32_t tokens[SLOTS * CANDIDATES], slots[SLOTS * CANDIDATES], positions[SLOTS * CANDIDATES];
  const uint8_t stored[SLOTS * CANDIDATES] = {0};
  float row_scores[SLOTS * CANDIDATES];
  int64_t first[SLOTS], count = 0;
  for (int slot = 0; slot < SLOTS; ++slot) {
    first[slot] = count;
    for (int i = 0; i < w->count[slot]; ++i, ++count) {
      tokens[count] = w->ids[slot * CANDIDATES + i];
      slots[count] = slot;
      positions[count] = PROMPT;
    }
  }
  const llm2_fast_rows branches = {.struct_size = sizeof(branches),
                                   .count = count,
                                   .token_ids = tokens,
                                   .slots = slots,
                                   .positions = positions,
                                   .stored = stored};
  OK(llm2_fast_decoder_forward(decoder, &w->cache, &branches, head, row_scores, 2));
  for (int slot = 0; slot < SLOTS; ++slot) {
    for (int i = 0; i < w->count[slot]; ++i) w->scores[slot * CANDIDATES + i] = row_scores[first[slot] + i];
  }
  w->pick.candidate_ids = w->ids;
  w->pick.candidate_logits = w->candidate_logits;
  w->pick.count = w->count;
  w->pick.scores = w->scores;
  w->pick.candidate_ids_row_stride = w->pick.candidate_logits_row_stride = w->pick.scores_row_stride = CANDIDATES;
  OK(llm2_fast_adjust_and_pick(&w->pick, 2));
  CHECK(memcmp(w->token, joint->token, sizeof(w->token)) == 0);
  CHECK(memcmp(w->logprob, joint->logprob, sizeof(w->logprob)) == 0);
  for (int slot = 0; slot < SLOTS; ++slot) {
    OK(llm2_fast_decoder_keep_row(decoder, &w->cache, first[slot] + w->index[slot]));
  }
  CHECK(memcmp(w->keys, joint->keys, sizeof(w->keys)) == 0);
  CHECK(memcmp(w->values, joint->values, sizeof(w->values)) == 0);
  CHECK(memcmp(w->hidden_states, joint->hidden_states, sizeof(w->hidden_states)) == 0);
  char message[64];
  snprintf(message, sizeof(message), "row: expected indices in [0, %d), got %d", (int)count, (int)count);
  REFUSED(llm2_fast_decoder_keep_row(decoder, &w->cache, count), message);
  free(w);
  free(joint);
  llm2_fast_score_head_destroy(head);
  llm2_fast_decoder_destroy(decoder);
}

/* A sequence of joint steps on a decoder that other threads use, too. */
typedef struct {
  llm2_fast_decoder* decoder;
  llm2_fast_score_head* head;
  workbench* w;
  int64_t bad_row; /* asked for after the first step, to fail */
  int32_t tokens[STEPS][SLOTS];
  char error[64];
} thread_run;

static void* run_thread(void* argument) {
  thread_run* run = argument;
  for (int step = 0; step < STEPS; ++step) {
    for (int slot = 0; slot < SLOTS; ++slot) {
      run->w->lengths[slot] = PROMPT + step;
      run->w->steps[slot] = step;
    }
    if (llm2_fast_decoder_joint_step(run->decoder, &run->w->cache, run->head, &run->w->joint, 2) != LLM2_FAST_OK) break;
    memcpy(run->tokens[step], run->w->token, sizeof(run->w->token));
    if (step == 0) llm2_fast_decoder_keep_row(run->decoder, &run->w->cache, run->bad_row);
  }
  snprintf(run->error, sizeof(run->error), "%s", llm2_fast_last_error());
  return NULL;
}

static void test_threads(void) {
  current_case = "threads";
  const model_kind kind = {.mlp = 1};
  run_record expected;
  core_joint_run(&kind, &expected);
  llm2_fast_decoder* decoder = make_decoder(&kind, 1);
  llm2_fast_score_head* head = make_head(1);
  const llm2_fast_select_candidates_args nothing = {.struct_size = 1};
  const llm2_fast_status status = llm2_fast_select_candidates(&nothing, 1);
  CHECK(status == LLM2_FAST_INVALID_ARGUMENT);
  char before[128];
  snprintf(before, sizeof(before), "%s", llm2_fast_last_error());

  thread_run runs[3];
  pthread_t threads[3];
  for (int i = 0; i < 3; ++i) {
    runs[i] = (thread_run){.decoder = decoder, .head = head, .w = make_workbench(), .bad_row = i};
    prefill(decoder, runs[i].w);
  }
  for (int i = 0; i < 3; ++i) CHECK(pthread_create(&threads[i], NULL, run_thread, &runs[i]) == 0);
  for (int i = 0; i < 3; ++i) {
    CHECK(pthread_join(threads[i], NULL) == 0);
    CHECK(memcmp(runs[i].tokens, expected.tokens, sizeof(expected.tokens)) == 0);
    char message[64];
    snprintf(message, sizeof(message), "row: expected indices in [0, 0), got %d", i);
    CHECK(strcmp(runs[i].error, message) == 0);
    free(runs[i].w);
  }
  CHECK(strcmp(llm2_fast_last_error(), before) == 0); /* each thread has its own */
  llm2_fast_score_head_destroy(head);
  llm2_fast_decoder_destroy(decoder);
}

/* --- refusals ----------------------------------------------------------------------------------------------------- */

static void test_structs(void) {
  current_case = "structs";
  REFUSED(llm2_fast_select_candidates(NULL, 1), "args: expected a struct, got NULL");
  llm2_fast_rows rows = {0};
  workbench* w = make_workbench();
  const model_kind kind = {.tied = 1};
  llm2_fast_decoder* decoder = make_decoder(&kind, 1);
  REFUSED(llm2_fast_decoder_forward(decoder, &w->cache, &rows, NULL, NULL, 1),
          "rows.struct_size: expected the size of the struct, got 0");

  /* A caller built against a later version: fine, as long as it uses nothing of it. */
  struct {
    llm2_fast_rows known;
    int64_t later;
  } longer = {.known = {.struct_size = sizeof(longer)}, .later = 0};
  OK(llm2_fast_decoder_forward(decoder, &w->cache, &longer.known, NULL, NULL, 1));
  longer.later = 1;
  REFUSED(llm2_fast_decoder_forward(decoder, &w->cache, &longer.known, NULL, NULL, 1),
          "rows.struct_size: expected at most 48 in this version, got 56 with fields set beyond that");
  /* A caller built against an earlier one: what it lacks is zero. */
  rows.struct_size = offsetof(llm2_fast_rows, token_ids);
  OK(llm2_fast_decoder_forward(decoder, &w->cache, &rows, NULL, NULL, 1));
  rows.count = 1;
  REFUSED(llm2_fast_decoder_forward(decoder, &w->cache, &rows, NULL, NULL, 1),
          "token_ids: expected a pointer, got NULL");
  free(w);
  llm2_fast_decoder_destroy(decoder);
}

static void test_refused_ops(void) {
  current_case = "refused ops";
  workbench* w = make_workbench();
  const float logits[SLOTS * VOCAB] = {0};
  llm2_fast_select_candidates_args select = w->select;
  select.vocab_size = VOCAB;
  select.dtype = LLM2_FAST_FLOAT32;
  select.logits = logits;
  select.logits_row_stride = VOCAB;
  OK(llm2_fast_select_candidates(&select, 2));
  CHECK(w->count[0] == CANDIDATES && w->cut[0] && w->ids[CANDIDATES - 1] == CANDIDATES - 1);
  REFUSED(llm2_fast_select_candidates(&select, 0), "num_threads: expected >= 1, got 0");
#define SELECT(field, value, message)                       \
  do {                                                      \
    llm2_fast_select_candidates_args bad = select;          \
    bad.field = value;                                      \
    REFUSED(llm2_fast_select_candidates(&bad, 1), message); \
  } while (0)
  SELECT(batch_size, -1, "batch_size: expected >= 0, got -1");
  SELECT(vocab_size, 0, "vocab_size: expected >= 1, got 0");
  SELECT(vocab_size, INT64_C(1) << 31, "vocab_size: expected <= 2147483647, got 2147483648");
  SELECT(max_candidates, 0, "max_candidates: expected >= 1, got 0");
  SELECT(dtype, 0, "dtype: expected LLM2_FAST_FLOAT32 or LLM2_FAST_BFLOAT16, got 0");
  SELECT(logits, NULL, "logits: expected a pointer, got NULL");
  SELECT(logits, (const char*)logits + 1, "logits: expected a pointer aligned to 4 bytes, got another");
  SELECT(logits_row_stride, VOCAB - 1, "logits_row_stride: expected >= 47, got 46");
  SELECT(log_alpha, NULL, "log_alpha: expected a pointer, got NULL");
  SELECT(ids, NULL, "ids: expected a pointer, got NULL");
  SELECT(cut, NULL, "cut: expected a pointer, got NULL");
  const llm2_fast_select_candidates_args empty = {
      .struct_size = sizeof(empty), .vocab_size = 1, .max_candidates = 1, .dtype = LLM2_FAST_BFLOAT16};
  OK(llm2_fast_select_candidates(&empty, 2));

  llm2_fast_adjust_and_pick_args pick = w->pick;
  pick.candidate_ids = w->ids;
  pick.candidate_logits = w->candidate_logits;
  pick.candidate_logits_row_stride = CANDIDATES;
  pick.count = w->count;
  const int32_t eos = 0;
  pick.num_eos = 1;
  pick.eos_token_ids = &eos;
  OK(llm2_fast_adjust_and_pick(&pick, 2));
  CHECK(w->token[0] == 0 && w->finished[0] && fabsf(w->logprob[0] + logf((float)CANDIDATES)) < 1e-6f);
#define PICK(field, value, message)                       \
  do {                                                    \
    llm2_fast_adjust_and_pick_args bad = pick;            \
    bad.field = value;                                    \
    REFUSED(llm2_fast_adjust_and_pick(&bad, 1), message); \
  } while (0)
  PICK(candidate_ids, NULL, "candidate_ids: expected a pointer, got NULL");
  PICK(candidate_ids_row_stride, 5, "candidate_ids_row_stride: expected >= 6, got 5");
  PICK(candidate_logits_row_stride, 0, "candidate_logits_row_stride: expected >= 6, got 0");
  PICK(scores, w->scores, "scores_row_stride: expected >= 6, got 0");
  PICK(seen, (const uint8_t*)w->scores, "seen_row_stride: expected >= 6, got 0");
  PICK(num_eos, -1, "num_eos: expected >= 0, got -1");
  PICK(eos_token_ids, NULL, "eos_token_ids: expected a pointer, got NULL");
  PICK(seed, NULL, "seed: expected a pointer, got NULL");
  PICK(adjusted, NULL, "adjusted: expected a pointer, got NULL");
  free(w);
}

static void test_attention(void) {
  current_case = "branch_attention";
  /* One row that sees nothing but itself, and one that sees a position of the prefix, with one head. */
  const float query[2] = {1, 1}, keys[4] = {0, 0, 0, 5}, values[4] = {1, 2, 3, 4}, own_key[2] = {0}, own_value[2] = {9};
  const int32_t block_table[2] = {1, 7}, sequence[2] = {0, 0}, length[2] = {0, 2};
  const uint8_t has_own[2] = {1, 0};
  float output[2] = {0};
  const llm2_fast_branch_attention_args args = {.struct_size = sizeof(args),
                                                .num_rows = 2,
                                                .num_sequences = 1,
                                                .max_blocks = 2,
                                                .num_heads = 1,
                                                .num_kv_heads = 1,
                                                .head_dim = 1,
                                                .num_blocks = 2,
                                                .block_size = 2,
                                                .dtype = LLM2_FAST_FLOAT32,
                                                .query = query,
                                                .query_row_stride = 1,
                                                .key_cache = keys,
                                                .key_block_stride = 2,
                                                .key_position_stride = 1,
                                                .value_cache = values,
                                                .value_block_stride = 2,
                                                .value_position_stride = 1,
                                                .block_table = block_table,
                                                .row_sequence = sequence,
                                                .row_prefix_length = length,
                                                .row_has_own = has_own,
                                                .own_key = own_key,
                                                .own_key_row_stride = 1,
                                                .own_value = own_value,
                                                .own_value_row_stride = 1,
                                                .scale = 1.0f,
                                                .output = output};
  OK(llm2_fast_branch_attention(&args, 2));
  const float weight = 1.0f / (1.0f + expf(5.0f));
  CHECK(output[0] == 9.0f && fabsf(output[1] - (3.0f * weight + 4.0f * (1.0f - weight))) < 1e-5f);
#define ATTENTION(field, value, message)                   \
  do {                                                     \
    llm2_fast_branch_attention_args bad = args;            \
    bad.field = value;                                     \
    REFUSED(llm2_fast_branch_attention(&bad, 1), message); \
  } while (0)
  ATTENTION(num_kv_heads, 2, "num_heads: expected a multiple of num_kv_heads = 2, got 1");
  ATTENTION(head_dim, 0, "head_dim: expected >= 1, got 0");
  ATTENTION(sliding_window, -1, "sliding_window: expected >= 0, got -1");
  ATTENTION(query_row_stride, 0, "query_row_stride: expected >= 1, got 0");
  ATTENTION(key_cache, NULL, "key_cache: expected a pointer, got NULL");
  ATTENTION(own_key, NULL, "own_key: expected a pointer, got NULL");
  ATTENTION(num_blocks, 1, "block_table[0][0]: expected an index in [0, 1), got 1");
  const int32_t too_long[2] = {0, 5}, past_table[2] = {0, 3}, no_sequence[2] = {0, 1};
  ATTENTION(row_prefix_length, too_long, "row_prefix_length[1]: expected a length in [0, 4], got 5");
  ATTENTION(row_prefix_length, past_table, "block_table[0][1]: expected an index in [0, 2), got 7");
  ATTENTION(row_sequence, no_sequence, "row_sequence[1]: expected an index in [0, 1), got 1");
}

static void test_commit(void) {
  current_case = "commit";
  /* Two layers, one head, blocks of two positions. Sequence 0 commits its second branch to slot 1, sequence 1 nothing.
   */
  const int32_t index[2] = {1, -1}, first_row[2] = {0, 2}, slots[2] = {1, 0}, block_table[4] = {0, 1, 3, 2};
  const float own_key[6] = {1, 2, 3, 4, 5, 6}, own_value[6] = {-1, -2, -3, -4, -5, -6}, hidden[3] = {7, 8, 9};
  float keys[16] = {0}, values[16] = {0}, hidden_states[2] = {0};
  int32_t lengths[2] = {0, 3};
  const llm2_fast_commit_args args = {.struct_size = sizeof(args),
                                      .batch_size = 2,
                                      .num_rows = 3,
                                      .num_layers = 2,
                                      .num_kv_heads = 1,
                                      .head_dim = 1,
                                      .hidden_size = 1,
                                      .num_blocks = 4,
                                      .block_size = 2,
                                      .num_slots = 2,
                                      .max_blocks = 2,
                                      .dtype = LLM2_FAST_FLOAT32,
                                      .index = index,
                                      .first_row = first_row,
                                      .slots = slots,
                                      .own_key = own_key,
                                      .own_value = own_value,
                                      .hidden = hidden,
                                      .keys = keys,
                                      .values = values,
                                      .block_table = block_table,
                                      .block_table_row_stride = 2,
                                      .hidden_states = hidden_states,
                                      .lengths = lengths};
#define COMMIT(field, value, message)         \
  do {                                        \
    llm2_fast_commit_args bad = args;         \
    bad.field = value;                        \
    REFUSED(llm2_fast_commit(&bad), message); \
  } while (0)
  COMMIT(dtype, LLM2_FAST_FLOAT16, "dtype: expected LLM2_FAST_FLOAT32 or LLM2_FAST_BFLOAT16, got 3");
  COMMIT(num_rows, 1, "first_row + index: expected indices in [0, 1), got 1");
  COMMIT(num_slots, 1, "slots: expected indices in [0, 1), got 1");
  COMMIT(num_blocks, 2, "block_table: expected indices in [0, 2), got 3");
  COMMIT(keys, NULL, "keys: expected a pointer, got NULL");
  COMMIT(hidden, NULL, "hidden: expected a pointer, got NULL");
  const int32_t twice[2] = {1, 1};
  COMMIT(slots, twice, "slots: expected distinct numbers, got 1 twice");
  int32_t full[2] = {0, 4};
  COMMIT(lengths, full, "positions: expected indices in [0, 4), got 4");
  OK(llm2_fast_commit(&args));
  /* Position 3 of slot 1 is the second of its second block, block 2; layer 1 begins after 4 blocks. */
  for (int i = 0; i < 16; ++i) {
    CHECK(keys[i] == (i == 2 * 2 + 1 ? 2.0f : i == (4 + 2) * 2 + 1 ? 5.0f : 0.0f));
    CHECK(values[i] == -keys[i]);
  }
  CHECK(lengths[0] == 0 && lengths[1] == 4 && hidden_states[0] == 0.0f && hidden_states[1] == 8.0f);
}

/* A library without CUDA says so. */
static void test_no_cuda(void) {
#if !WITH_CUDA
  current_case = "no cuda";
  const char* message = "the library was built without CUDA (LLM2_FAST_CUDA=ON builds it with)";
  size_t bytes = 0;
  const llm2_fast_status statuses[] = {llm2_fast_cuda_select_candidates_workspace(NULL, &bytes),
                                       llm2_fast_cuda_select_candidates(NULL, NULL, 0, NULL),
                                       llm2_fast_cuda_adjust_and_pick(NULL, NULL), llm2_fast_cuda_commit(NULL, NULL)};
  for (int i = 0; i < 4; ++i) CHECK(statuses[i] == LLM2_FAST_UNAVAILABLE);
  CHECK(strcmp(llm2_fast_last_error(), message) == 0);
#endif
}

static void test_refused_builders(void) {
  current_case = "refused builders";
  const model_kind kind = {.qk_norm = 1};
  llm2_fast_decoder_builder* builder = NULL;
#define SPEC(field, value, message)                                     \
  do {                                                                  \
    llm2_fast_decoder_spec bad = spec_of(&kind);                        \
    bad.field = value;                                                  \
    REFUSED(llm2_fast_decoder_builder_create(&bad, &builder), message); \
    CHECK(builder == NULL);                                             \
  } while (0)
  SPEC(dtype, 9, "dtype: expected LLM2_FAST_FLOAT32 or LLM2_FAST_BFLOAT16, got 9");
  SPEC(hidden_size, 21, "hidden_size: expected an even number, got 21");
  SPEC(num_layers, 0, "num_layers: expected >= 1, got 0");
  SPEC(num_kv_heads, 3, "num_heads: expected a multiple of num_kv_heads, got 4");
  SPEC(head_dim, 7, "head_dim: expected 6, got 7");
  SPEC(vocab_size, 0, "vocab_size: expected >= 1, got 0");
  SPEC(rms_norm_eps, 0.0f, "rms_norm_eps: expected a positive number, got 0.000000");
  SPEC(attention_scale, NAN, "attention_scale: expected a positive number, got nan");
  SPEC(inv_freq, NULL, "inv_freq: expected a pointer, got NULL");
  const int64_t windows[LAYERS] = {0, -1, 0};
  SPEC(sliding_windows, windows, "sliding_windows: expected >= 0, got -1");
  const llm2_fast_decoder_spec spec = spec_of(&kind);
  REFUSED(llm2_fast_decoder_builder_create(&spec, NULL), "builder: expected a pointer to a handle, got NULL");

  builder = filled_builder(&kind, 1);
  const char* norm = "model.layers.0.input_layernorm.weight";
  REFUSED(add_tensor(builder, norm, HIDDEN, 0),
          "name: expected a tensor that was not added yet, got "
          "'model.layers.0.input_layernorm.weight'");
  REFUSED(add_tensor(builder, norm, 4, HIDDEN),
          "model.layers.0.input_layernorm.weight: expected shape [20], got shape [4, 20]");
  REFUSED(add_tensor(builder, "model.layers.3.input_layernorm.weight", HIDDEN, 0),
          "name: expected a tensor of this decoder, got 'model.layers.3.input_layernorm.weight'");
  REFUSED(add_tensor(builder, "model.layers.0.pre_feedforward_layernorm.weight", HIDDEN, 0),
          "name: expected a tensor of this decoder, got 'model.layers.0.pre_feedforward_layernorm.weight'");
  const int64_t shape[3] = {HIDDEN, 1, 1};
  REFUSED(llm2_fast_decoder_builder_add(builder, norm, LLM2_FAST_FLOAT32, shape, 3, kInvFreq),
          "ndim: expected indices in [0, 3), got 3");
  REFUSED(llm2_fast_decoder_builder_add(builder, norm, LLM2_FAST_FLOAT32, shape, 1, NULL),
          "data: expected a pointer, got NULL");
  REFUSED(llm2_fast_decoder_builder_add(builder, NULL, LLM2_FAST_FLOAT32, shape, 1, kInvFreq),
          "name: expected a string, got NULL");
  REFUSED(llm2_fast_decoder_builder_add(NULL, norm, LLM2_FAST_FLOAT32, shape, 1, kInvFreq),
          "builder: expected a handle, got NULL");

  llm2_fast_decoder* decoder = NULL;
  OK(add_tensor(builder, "model.layers.1.mlp.up_proj.bias", INNER, 0));
  REFUSED(llm2_fast_decoder_builder_finish(builder, 1, &decoder),
          "model.layers.1.mlp.up_proj.bias: expected none, since there is no model.layers.0.mlp.up_proj.bias, got a "
          "tensor");
  OK(add_tensor(builder, "model.layers.0.mlp.up_proj.bias", INNER, 0));
  REFUSED(llm2_fast_decoder_builder_finish(builder, 1, &decoder),
          "model.layers.2.mlp.up_proj.bias: expected a tensor, got none");
  CHECK(decoder == NULL);
  OK(add_tensor(builder, "model.layers.2.mlp.up_proj.bias", INNER, 0));
  OK(llm2_fast_decoder_builder_finish(builder, 1, &decoder));
  CHECK(decoder != NULL);
  llm2_fast_decoder* second = NULL;
  REFUSED(llm2_fast_decoder_builder_finish(builder, 1, &second),
          "builder: expected one that has made no decoder yet, got another");
  llm2_fast_decoder_destroy(decoder);
  llm2_fast_decoder_builder_destroy(builder);

  OK(llm2_fast_decoder_builder_create(&spec, &builder));
  REFUSED(llm2_fast_decoder_builder_finish(builder, 1, &decoder),
          "model.embed_tokens.weight: expected a tensor, got none");
  llm2_fast_decoder_builder_destroy(builder);
  llm2_fast_decoder_builder_destroy(NULL);
  llm2_fast_decoder_destroy(NULL);
  llm2_fast_score_head_destroy(NULL);
}

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED
#elif defined(__has_feature) /* how older versions of Clang tell */
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define SANITIZED
#endif
#endif

/* Sanitizers end the program instead. */
static void test_out_of_memory(void) {
#ifndef SANITIZED
  current_case = "out of memory";
  const model_kind kind = {0};
  llm2_fast_decoder_spec spec = spec_of(&kind);
  spec.vocab_size = INT32_MAX;
  spec.hidden_size = 1 << 26;
  llm2_fast_decoder_builder* builder = NULL;
  OK(llm2_fast_decoder_builder_create(&spec, &builder));
  const int64_t shape[2] = {spec.vocab_size, spec.hidden_size};
  const llm2_fast_status status =
      llm2_fast_decoder_builder_add(builder, "lm_head.weight", LLM2_FAST_FLOAT32, shape, 2, kInvFreq);
  CHECK(status == LLM2_FAST_OUT_OF_MEMORY && strcmp(llm2_fast_last_error(), "out of memory") == 0);
  llm2_fast_decoder_builder_destroy(builder);
#endif
}

static void test_refused_passes(void) {
  current_case = "refused passes";
  const model_kind kind = {.bfloat16 = 1};
  llm2_fast_decoder* decoder = make_decoder(&kind, 1);
  workbench* w = make_workbench();
  const int32_t tokens[3] = {1, 2, 3}, slots[3] = {0, 0, 1}, positions[3] = {0, 1, 0};
  const uint8_t stored[3] = {1, 1, 1};
  const llm2_fast_rows rows = {.struct_size = sizeof(rows),
                               .count = 3,
                               .token_ids = tokens,
                               .slots = slots,
                               .positions = positions,
                               .stored = stored};
  REFUSED(llm2_fast_decoder_forward(NULL, &w->cache, &rows, NULL, NULL, 1), "decoder: expected a handle, got NULL");
  REFUSED(llm2_fast_decoder_forward(decoder, NULL, &rows, NULL, NULL, 1), "cache: expected a struct, got NULL");
  REFUSED(llm2_fast_decoder_forward(decoder, &w->cache, NULL, NULL, NULL, 1), "rows: expected a struct, got NULL");
  REFUSED(llm2_fast_decoder_forward(decoder, &w->cache, &rows, NULL, NULL, 0), "num_threads: expected >= 1, got 0");
  REFUSED(llm2_fast_decoder_keep_row(decoder, &w->cache, 0), "row: expected indices in [0, 0), got 0");
#define ROWS(field, message, ...)                                                         \
  do {                                                                                    \
    const int32_t other[3] = {__VA_ARGS__};                                               \
    llm2_fast_rows bad = rows;                                                            \
    bad.field = other;                                                                    \
    REFUSED(llm2_fast_decoder_forward(decoder, &w->cache, &bad, NULL, NULL, 1), message); \
  } while (0)
  ROWS(token_ids, "token_ids: expected indices in [0, 47), got 47", 1, 47, 3);
  ROWS(token_ids, "token_ids: expected indices in [0, 47), got -1", -1, 2, 3);
  ROWS(slots, "slots: expected indices in [0, 2), got 2", 0, 0, 2);
  ROWS(slots, "slots of runs of rows: expected distinct numbers, got 0 twice", 0, 1, 0);
  ROWS(positions, "positions: expected >= 0, got -1", -1, 0, 0);
  ROWS(positions, "positions: expected indices in [0, 24), got 24", 0, 24, 0);
  ROWS(positions, "positions: expected stored rows of a slot in ascending order, got 1 after 1", 1, 1, 0);
#define CACHE(field, value, message)                                                  \
  do {                                                                                \
    llm2_fast_paged_cache bad = w->cache;                                             \
    bad.field = value;                                                                \
    REFUSED(llm2_fast_decoder_forward(decoder, &bad, &rows, NULL, NULL, 1), message); \
  } while (0)
  CACHE(num_blocks, 5, "block_table: expected indices in [0, 5), got 6");
  CACHE(num_slots, 1, "slots: expected indices in [0, 1), got 1");
  CACHE(block_size, 0, "block_size: expected >= 1, got 0");
  CACHE(block_table_row_stride, 1, "block_table_row_stride: expected >= 6, got 1");
  CACHE(keys, NULL, "keys: expected a pointer, got NULL");
  CACHE(hidden_states, (char*)w->hidden_states + 1,
        "hidden_states: expected a pointer aligned to 2 bytes, got another");

  OK(llm2_fast_decoder_forward(decoder, &w->cache, &rows, NULL, NULL, 1));
  llm2_fast_paged_cache smaller = w->cache;
  smaller.num_slots = 1;
  REFUSED(llm2_fast_decoder_keep_row(decoder, &smaller, 2), "slots: expected indices in [0, 1), got 1");
  OK(llm2_fast_decoder_keep_row(decoder, &w->cache, 2));
  free(w);
  llm2_fast_decoder_destroy(decoder);
}

static void test_refused_steps(void) {
  current_case = "refused steps";
  const model_kind kind = {0};
  llm2_fast_decoder *decoder = make_decoder(&kind, 1), *scorer = make_decoder(&kind, 0);
  llm2_fast_score_head* head = make_head(1);
  workbench* w = make_workbench();
  prefill(decoder, w);
  w->lengths[0] = w->lengths[1] = PROMPT;
  const int32_t twice[SLOTS] = {1, 1}, one = 1, zero = 0;
  const uint8_t branch = 0;
  const llm2_fast_rows none = {.struct_size = sizeof(none)};
  const llm2_fast_rows unstored = {.struct_size = sizeof(unstored),
                                   .count = 1,
                                   .token_ids = &one,
                                   .slots = &zero,
                                   .positions = &zero,
                                   .stored = &branch};
  const char* no_lm_head = "decoder: expected one with an lm_head, got one without";
  REFUSED(llm2_fast_decoder_propose(scorer, &w->cache, &none, w->slots, &w->select, 1), no_lm_head);
  REFUSED(llm2_fast_decoder_propose(decoder, &w->cache, &unstored, w->slots, &w->select, 1),
          "stored: expected pending rows that are stored, got a branch");
  REFUSED(llm2_fast_decoder_propose(decoder, &w->cache, &none, twice, &w->select, 1),
          "slots: expected distinct numbers, got 1 twice");
  w->select.vocab_size = VOCAB + 1;
  REFUSED(llm2_fast_decoder_propose(decoder, &w->cache, &none, w->slots, &w->select, 1),
          "vocab_size: expected at most 47, got 48");
  w->select.vocab_size = 3;
  OK(llm2_fast_decoder_propose(decoder, &w->cache, &none, w->slots, &w->select, 1));
  CHECK(w->count[0] > 0 && w->ids[0] < 3);
  w->select.vocab_size = 0;
  w->select.logits = w->scores;
  REFUSED(llm2_fast_decoder_propose(decoder, &w->cache, &none, w->slots, &w->select, 1),
          "logits: expected NULL, since the step provides it, got a pointer");
  w->select.logits = NULL;

  REFUSED(llm2_fast_decoder_plain_step(decoder, &w->cache, &none, w->slots, &w->pick, 1),
          "max_candidates of pick: expected 47, got 6");
  w->pick.count = w->count;
  REFUSED(llm2_fast_decoder_plain_step(decoder, &w->cache, &none, w->slots, &w->pick, 1),
          "count: expected NULL, since the step provides it, got a pointer");
  w->pick.count = NULL;

  OK(llm2_fast_decoder_joint_step(decoder, &w->cache, head, &w->joint, 1));
  REFUSED(llm2_fast_decoder_joint_step(decoder, &w->cache, NULL, &w->joint, 1), "head: expected a handle, got NULL");
  REFUSED(llm2_fast_decoder_joint_step(scorer, &w->cache, head, &w->joint, 1), no_lm_head);
#define JOINT(field, value, message)                                                   \
  do {                                                                                 \
    llm2_fast_joint_step bad = w->joint;                                               \
    bad.field = value;                                                                 \
    REFUSED(llm2_fast_decoder_joint_step(decoder, &w->cache, head, &bad, 1), message); \
  } while (0)
  JOINT(select, NULL, "select: expected a struct, got NULL");
  JOINT(batch_size, 1, "batch_size of select: expected 1, got 2");
  JOINT(slots, twice, "slots: expected distinct numbers, got 1 twice");
  JOINT(lengths, NULL, "lengths: expected a pointer, got NULL");
  JOINT(scores, NULL, "scores: expected a pointer, got NULL");
  const int32_t full[SLOTS] = {PROMPT, MAX_BLOCKS * BLOCK_SIZE};
  JOINT(lengths, full, "positions: expected indices in [0, 24), got 24");
  w->pick.max_candidates = CANDIDATES - 1;
  JOINT(seen, NULL, "max_candidates of pick: expected 6, got 5");

  const int64_t beyond[1] = {LAYERS - 1};
  const float weight[2 * HIDDEN] = {0};
  llm2_fast_score_head_spec spec = {
      .struct_size = sizeof(spec), .hidden_size = HIDDEN, .num_layers = 1, .layers = beyond, .score_weight = weight};
  llm2_fast_score_head* other = NULL;
  OK(llm2_fast_score_head_create(&spec, &other));
  REFUSED(llm2_fast_decoder_forward(decoder, &w->cache, &none, other, NULL, 1),
          "layers: expected indices in [0, 2), got 2");
  llm2_fast_score_head_destroy(other);
  spec.hidden_size = HIDDEN - 2;
  spec.layers = kHeadLayers;
  OK(llm2_fast_score_head_create(&spec, &other));
  REFUSED(llm2_fast_decoder_forward(decoder, &w->cache, &none, other, NULL, 1),
          "features of the head: expected 20, got 18");
  llm2_fast_score_head_destroy(other);
  spec.mlp_size = 1;
  REFUSED(llm2_fast_score_head_create(&spec, &other), "dense_weight: expected a pointer, got NULL");
  CHECK(other == NULL);
  free(w);
  llm2_fast_score_head_destroy(head);
  llm2_fast_decoder_destroy(scorer);
  llm2_fast_decoder_destroy(decoder);
}

int main(void) {
  const char* isa = NULL;
  CHECK(strcmp(llm2_fast_last_error(), "") == 0);
  CHECK(strcmp(llm2_fast_version(), EXPECTED_VERSION) == 0);
  OK(llm2_fast_cpu_isa(&isa));
  REFUSED(llm2_fast_cpu_isa(NULL), "name: expected a pointer, got NULL");
  for (int bits = 0; bits < 32; ++bits) {
    const model_kind kind = {bits & 1, bits >> 1 & 1, bits >> 2 & 1, bits >> 3 & 1, bits >> 4 & 1};
    char name[64];
    snprintf(name, sizeof(name), "bfloat16=%d tied=%d qk_norm=%d bias=%d mlp=%d", kind.bfloat16, kind.tied,
             kind.qk_norm, kind.bias, kind.mlp);
    current_case = name;
    if (!kind.mlp) test_plain(&kind);
    test_joint(&kind);
  }
  test_step_by_step();
  test_threads();
  test_structs();
  test_refused_ops();
  test_attention();
  test_commit();
  test_no_cuda();
  test_refused_builders();
  test_out_of_memory();
  test_refused_passes();
  test_refused_steps();
  printf(failures == 0 ? "%s: all checks passed\n" : "%s: %d checks failed\n", isa, failures);
  return failures == 0 ? 0 : 1;
}
