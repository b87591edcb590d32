/* A tiny decoder with fixed pseudo-random weights, and what the C++ core makes of it: test_c_api.c does the same
 * through the C API and expects the same bits. */
#ifndef LLM2_FAST_TESTS_CORE_TWIN_H_
#define LLM2_FAST_TESTS_CORE_TWIN_H_

#include <math.h>
#include <stdint.h>
#include <string.h>

enum {
  HIDDEN = 20,
  INNER = 23,
  HEADS = 4,
  KV_HEADS = 2,
  HEAD_DIM = 6,
  VOCAB = 47,
  LAYERS = 3,
  SLOTS = 2,
  BLOCK_SIZE = 4,
  MAX_BLOCKS = 6, /* per slot */
  BLOCKS = SLOTS * MAX_BLOCKS,
  PROMPT = 5,
  STEPS = 8,
  CANDIDATES = 6,
  MLP = 5
};

static const float kInvFreq[HEAD_DIM / 2] = {1.0f, 0.3f, 0.05f};
static const int64_t kWindows[LAYERS] = {0, 3, 0};
static const int32_t kPrompt[SLOTS][PROMPT] = {{3, 14, 15, 9, 26}, {40, 1, 2, 46, 0}};
static const int64_t kHeadLayers[2] = {1, -1}; /* -1: the output of the final norm */
static const float kRmsNormEps = 1e-5f, kAttentionScale = 0.4f, kLogAlpha = -1.5f, kBeta = 2.0f;

/* Element i of the tensor called `name`: fixed, in (-0.5, 0.5); norms are around 1. */
static inline float tensor_element(const char* name, int64_t i) {
  uint32_t hash = 2166136261u;
  for (const char* c = name; *c != 0; ++c) hash = (hash ^ (uint32_t)(unsigned char)*c) * 16777619u;
  hash ^= (uint32_t)i * 2654435761u;
  hash ^= hash >> 15;
  hash *= 2246822519u;
  hash ^= hash >> 13;
  hash *= 3266489917u;
  hash ^= hash >> 16;
  const float noise = ((float)(hash >> 8) + 0.5f) / 16777216.0f - 0.5f;
  return strstr(name, "norm") != NULL ? 1.0f + 0.5f * noise : noise;
}

/* Block i of slot s: an order that is not that of memory. */
static inline int32_t block_of(int64_t slot, int64_t i) {
  return (int32_t)((slot * MAX_BLOCKS + i) * 5 % BLOCKS);
}

/* The options of a sequence's pick: slot 0 is greedy, slot 1 sampled. */
static inline float temperature_of(int64_t slot) {
  return slot == 0 ? 0.0f : 0.8f;
}

/* What the steps of one run gave. */
typedef struct {
  int32_t tokens[STEPS][SLOTS];
  float logprobs[STEPS][SLOTS];
  int32_t counts[STEPS][SLOTS];              /* joint steps only */
  float scores[STEPS][SLOTS * CANDIDATES];   /* joint steps only */
  float adjusted[STEPS][SLOTS * CANDIDATES]; /* joint steps only */
} run_record;

typedef struct {
  int bfloat16; /* else float32 */
  int tied;     /* lm_head is the embedding table */
  int qk_norm, bias;
  int mlp; /* the head has a hidden layer */
} model_kind;

#ifdef __cplusplus
extern "C" {
#endif

void core_plain_run(const model_kind* kind, run_record* record);
void core_joint_run(const model_kind* kind, run_record* record);

#ifdef __cplusplus
}
#endif

#endif
