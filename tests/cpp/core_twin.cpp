#include "core_twin.h"

#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "llm2_fast/step.h"

namespace {

using namespace llm2_fast;

constexpr float kInf = std::numeric_limits<float>::infinity();

template <typename T>
class Twin {
 public:
  explicit Twin(const model_kind& kind)
      : kind_(kind), keys_(LAYERS * BLOCKS * KV_HEADS * BLOCK_SIZE * HEAD_DIM), values_(keys_.size()) {
    hidden_.resize(SLOTS * HIDDEN);
    for (int64_t slot = 0; slot < SLOTS; ++slot) {
      for (int64_t i = 0; i < MAX_BLOCKS; ++i) table_.push_back(block_of(slot, i));
    }
    DecoderWeights weights;
    weights.spec = {sizeof(T) == 4 ? DType::kFloat32 : DType::kBFloat16,
                    HIDDEN,
                    INNER,
                    HEADS,
                    KV_HEADS,
                    HEAD_DIM,
                    VOCAB,
                    kRmsNormEps,
                    kAttentionScale,
                    1.0f,
                    Activation::kSilu,
                    {{{kInvFreq, kInvFreq + HEAD_DIM / 2}, 1.0f}}};
    for (int i = 0; i < LAYERS; ++i) weights.layers.push_back(layer(i));
    weights.final_norm = vector("model.norm.weight", HIDDEN);
    embedding_ = tensor("model.embed_tokens.weight", VOCAB * HIDDEN);
    weights.lm_head = pack({kind.tied ? "model.embed_tokens" : "lm_head"}, {VOCAB}, HIDDEN, false);
    weights.embedding = kind.tied ? nullptr : embedding_.data();
    decoder_.reset(new Decoder(std::move(weights), active_isa()));
    prefill();
  }

  void plain_run(run_record* record) {
    std::vector<float> adjusted(SLOTS * VOCAB);
    for (int step = 0; step < STEPS; ++step) {
      // The token of the step before, or nothing after the prompt.
      const std::vector<int32_t> last(record->tokens[step > 0 ? step - 1 : 0],
                                      record->tokens[step > 0 ? step - 1 : 0] + SLOTS);
      const std::vector<int32_t> positions(SLOTS, PROMPT + step - 1);
      const std::vector<uint8_t> stored(SLOTS, 1);
      const DecoderRows pending = {step > 0 ? SLOTS : 0, last.data(), slots_.data(), positions.data(), stored.data()};
      StepBatch batch = options(step, 1, record);
      batch.pick.max_candidates = VOCAB;
      batch.pick.adjusted = adjusted.data();
      plain_step(*decoder_, cache(), pending, batch, 1);
    }
  }

  void joint_run(run_record* record) {
    ScoreHead head;
    head.layers.assign(kHeadLayers, kHeadLayers + 2);
    if (kind_.mlp) {
      head.dense_weight = floats("dense.weight", MLP * 2 * HIDDEN);
      head.dense_bias = floats("dense.bias", MLP);
    }
    head.score_weight = floats("score.weight", kind_.mlp ? MLP : 2 * HIDDEN);
    head.score_bias = 0.25f;
    for (int step = 0; step < STEPS; ++step) {
      lengths_.assign(SLOTS, PROMPT + step);
      StepBatch batch = options(step, CANDIDATES, record);
      batch.pick.adjusted = record->adjusted[step];
      batch.select.count = record->counts[step];
      batch.scores = record->scores[step];
      joint_step(*decoder_, cache(), head, nullptr, batch, 1);
    }
  }

 private:
  static std::vector<float> floats(const std::string& name, int64_t size) {
    std::vector<float> values;
    for (int64_t i = 0; i < size; ++i) values.push_back(tensor_element(name.c_str(), i));
    return values;
  }

  static std::vector<T> tensor(const std::string& name, int64_t size) {
    std::vector<T> values(static_cast<size_t>(size));
    for (int64_t i = 0; i < size; ++i) from_float(tensor_element(name.c_str(), i), &values[static_cast<size_t>(i)]);
    return values;
  }

  static std::vector<float> vector(const std::string& name, int64_t size) {
    std::vector<float> values;
    for (T value : tensor(name, size)) values.push_back(to_float(value));
    return values;
  }

  std::shared_ptr<const PackedLinear> pack(const std::vector<std::string>& modules, const std::vector<int64_t>& sizes,
                                           int64_t in_features, bool bias) const {
    std::vector<std::vector<T>> weights;
    std::vector<std::vector<float>> biases;
    std::vector<WeightView> views;
    for (size_t i = 0; i < modules.size(); ++i) {
      weights.push_back(tensor(modules[i] + ".weight", sizes[i] * in_features));
      biases.push_back(vector(modules[i] + ".bias", sizes[i]));
      views.push_back({weights[i].data(), sizes[i], in_features, bias ? biases[i].data() : nullptr});
    }
    const Arrangement arrangement = modules.size() == 2 ? Arrangement::kInterleaved : Arrangement::kStacked;
    return std::make_shared<PackedLinear>(sizeof(T) == 4 ? DType::kFloat32 : DType::kBFloat16, views, in_features,
                                          arrangement, active_isa(), 1);
  }

  DecoderLayer layer(int index) const {
    const std::string prefix = "model.layers." + std::to_string(index) + ".", attention = prefix + "self_attn.";
    DecoderLayer layer = {};
    layer.input_norm = vector(prefix + "input_layernorm.weight", HIDDEN);
    layer.mlp_input_norm = vector(prefix + "post_attention_layernorm.weight", HIDDEN);
    if (kind_.qk_norm) {
      layer.q_norm = vector(attention + "q_norm.weight", HEAD_DIM);
      layer.k_norm = vector(attention + "k_norm.weight", HEAD_DIM);
    }
    constexpr int64_t kQ = HEADS * HEAD_DIM, kKv = KV_HEADS * HEAD_DIM;
    layer.qkv.weight =
        pack({attention + "q_proj", attention + "k_proj", attention + "v_proj"}, {kQ, kKv, kKv}, HIDDEN, kind_.bias);
    layer.o.weight = pack({attention + "o_proj"}, {HIDDEN}, kQ, kind_.bias);
    layer.gate_up.weight = pack({prefix + "mlp.gate_proj", prefix + "mlp.up_proj"}, {INNER, INNER}, HIDDEN, kind_.bias);
    layer.down.weight = pack({prefix + "mlp.down_proj"}, {HIDDEN}, INNER, kind_.bias);
    layer.sliding_window = kWindows[index];
    return layer;
  }

  PagedCache cache() {
    return {keys_.data(), values_.data(), BLOCKS,     BLOCK_SIZE,    SLOTS,
            MAX_BLOCKS,   table_.data(),  MAX_BLOCKS, hidden_.data()};
  }

  void prefill() {
    for (int32_t slot = 0; slot < SLOTS; ++slot) {
      const std::vector<int32_t> slots(PROMPT, slot), positions = {0, 1, 2, 3, 4};
      const std::vector<uint8_t> stored(PROMPT, 1);
      decoder_->forward(cache(), {PROMPT, kPrompt[slot], slots.data(), positions.data(), stored.data()}, nullptr,
                        nullptr, 1);
      decoder_->keep_row(cache(), PROMPT - 1);
    }
  }

  // A step of both slots whose tokens and log-probabilities go to the record.
  StepBatch options(int step, int64_t max_candidates, run_record* record) {
    steps_.assign(SLOTS, step);
    StepBatch batch = {};
    batch.size = SLOTS;
    batch.slots = slots_.data();
    batch.lengths = lengths_.data();
    SelectCandidatesArgs& select = batch.select;
    select.vocab_size = VOCAB;
    select.max_candidates = max_candidates;
    select.log_alpha = log_alpha_.data();
    select.candidate_top_k = zeros_.data();
    select.ids = ids_.data();
    select.candidate_logits = logits_.data();
    select.count = count_.data();
    select.logsumexp = logsumexp_.data();
    select.cut = cut_;
    AdjustAndPickArgs& pick = batch.pick;
    pick.max_candidates = max_candidates;
    pick.beta = beta_.data();
    pick.repetition_penalty = pick.top_p = ones_.data();
    pick.temperature = temperature_.data();
    pick.top_k = zeros_.data();
    pick.log_min_p = log_min_p_.data();
    pick.seed = seeds_.data();
    pick.step = steps_.data();
    pick.sample_index = zeros_.data();
    pick.request_id = slots_.data();
    pick.index = index_.data();
    pick.token = record->tokens[step];
    pick.logprob = record->logprobs[step];
    pick.system1_index = system1_index_.data();
    pick.finished = finished_;
    return batch;
  }

  model_kind kind_;
  std::vector<T> keys_, values_, hidden_, embedding_;
  std::vector<int32_t> table_, slots_ = {0, 1}, lengths_, steps_, zeros_ = {0, 0};
  std::vector<float> log_alpha_ = {kLogAlpha, kLogAlpha}, beta_ = {kBeta, kBeta}, ones_ = {1, 1};
  std::vector<float> temperature_ = {temperature_of(0), temperature_of(1)}, log_min_p_ = {-kInf, -kInf};
  std::vector<int64_t> seeds_ = {7, 7};
  std::vector<int32_t> ids_ = std::vector<int32_t>(SLOTS * CANDIDATES), count_ = {0, 0};
  std::vector<int32_t> index_ = {0, 0}, system1_index_ = {0, 0};
  std::vector<float> logits_ = std::vector<float>(SLOTS * CANDIDATES), logsumexp_ = {0, 0};
  bool cut_[SLOTS], finished_[SLOTS];
  std::unique_ptr<Decoder> decoder_;
};

}  // namespace

void core_plain_run(const model_kind* kind, run_record* record) {
  kind->bfloat16 ? Twin<BFloat16>(*kind).plain_run(record) : Twin<float>(*kind).plain_run(record);
}

void core_joint_run(const model_kind* kind, run_record* record) {
  kind->bfloat16 ? Twin<BFloat16>(*kind).joint_run(record) : Twin<float>(*kind).joint_run(record);
}
