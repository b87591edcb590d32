// A decoder of the Llama or Gemma-3 family on the CPU: passes over branches with a paged key/value cache, in float32
// arithmetic.
//
// Rows see the committed prefix of their sequence before their position, and themselves, always in this order. A row's
// result is therefore bitwise the same as a token of a prompt, as the last token, or as a branch, with whatever rows
// and threads it is computed.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "llm2_fast/ops.h"
#include "llm2_fast/packed_linear.h"

namespace llm2_fast {

enum class Activation { kSilu, kGeluTanh };

// Rotary positions of some of the layers.
struct RotaryTable {
  std::vector<float> inv_freq;  // [head_dim / 2], radians per position
  float scale;                  // on cosines and sines
};

// What the model looks like; the fields have the names of llm2_fast.models.spec.DecoderSpec.
struct DecoderSpec {
  DType dtype;  // of weights, cache and the inputs of linear layers
  int64_t hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim, vocab_size;
  float rms_norm_eps;
  float attention_scale;  // on the dot products
  float embedding_scale;  // on the embeddings, which are then rounded to the dtype
  Activation activation;  // of the gate
  std::vector<RotaryTable> rotary_tables;
};

// A linear layer, perhaps with a low-rank update: y = W x + B A x.
struct AdaptedLinear {
  std::shared_ptr<const PackedLinear> weight;
  std::shared_ptr<const PackedLinear> lora_a;  // null without an update
  std::shared_ptr<const PackedLinear> lora_b;
};

struct DecoderLayer {
  std::vector<float> input_norm, mlp_input_norm;              // [hidden_size]
  std::vector<float> attention_output_norm, mlp_output_norm;  // [hidden_size], ahead of the residual; or empty
  std::vector<float> q_norm, k_norm;                          // [head_dim], or empty
  AdaptedLinear qkv, o, gate_up, down;
  int64_t sliding_window;  // 0 for none
  int64_t rotary_table;    // index
};

// Scalar head: score . x + score_bias, or score . silu(dense x + dense_bias) + score_bias, of the hidden states of
// `layers`, concatenated.
struct ScoreHead {
  static constexpr int64_t kFinalLayer = -1;  // the output of the final norm
  std::vector<int64_t> layers;
  std::vector<float> dense_weight, dense_bias;  // [mlp_size, features], [mlp_size]; empty without a hidden layer
  std::vector<float> score_weight;              // [mlp_size or features]
  float score_bias;
};

// Views of the caller's storage.
struct PagedCache {
  void* keys;    // [num_layers, num_blocks, num_kv_heads, block_size, head_dim], contiguous
  void* values;  // as keys
  int64_t num_blocks, block_size;
  int64_t num_slots, max_blocks;
  const int32_t* block_table;  // [num_slots, max_blocks]
  int64_t block_table_row_stride;
  void* hidden_states;  // [num_slots, hidden_size], contiguous: final hidden state of each slot's last token
};

// Rows of one pass. Rows of one slot are consecutive; those that extend its prefix stand in the order of positions.
struct DecoderRows {
  int64_t count;
  const int32_t* token_ids;  // [count]
  const int32_t* slots;      // [count]
  const int32_t* positions;  // [count]; the row sees the positions before it
  const uint8_t* stored;     // [count]; the row extends its prefix: its key and value are cached before attention
  // Rows from this one on are adapted: they get the low-rank updates.
  int64_t first_adapted = 0;
  // The adapted rows' cache, in which their slots are; null if it is the pass's.
  const PagedCache* adapted_cache = nullptr;
};

struct DecoderWeights {
  DecoderSpec spec;
  std::vector<DecoderLayer> layers;
  std::vector<float> final_norm;                // [hidden_size]
  const void* embedding = nullptr;              // [vocab_size, hidden_size] of the dtype; null: lm_head's weight
  std::shared_ptr<const PackedLinear> lm_head;  // null in a verifier
};

class Decoder {
 public:
  // All linear layers are packed for one tier. What `weights.embedding` points at must outlive the decoder.
  explicit Decoder(DecoderWeights weights, Isa isa);
  ~Decoder();

  const DecoderWeights& weights() const { return weights_; }
  const DecoderSpec& spec() const { return weights_.spec; }
  Isa isa() const { return isa_; }

  // One pass over the weights. With a head, computes scores [rows], those of the adapted rows only if these have a
  // cache of their own. Throws std::bad_alloc.
  void forward(const PagedCache& cache, const DecoderRows& rows, const ScoreHead* head, float* scores, int num_threads);

  // Makes a row of the last pass the last token of its slot: its final hidden state is kept and, unless the pass did
  // so, its keys and values are cached.
  void keep_row(const PagedCache& cache, int64_t row) const;

  // Selects candidates from the logits after the last tokens of `slots` [count]. The logits are computed panel by panel
  // and not kept, except for those rows where `logits` [count] says where to write them, [vocab_size]. Throws
  // std::bad_alloc.
  void select(const PagedCache& cache, const int32_t* slots, int64_t count, const SelectCandidatesArgs& args,
              float* const* logits, int num_threads);

 private:
  struct Workspace;
  class Pass;

  DecoderWeights weights_;
  Isa isa_;
  std::unique_ptr<Workspace> workspace_;
};

}  // namespace llm2_fast
