// The decoder of the C API.
#include <algorithm>
#include <numeric>
#include <utility>
#include <vector>

#include "arguments.h"
#include "decoder_builder.h"
#include "llm2_fast/checked_decoder.h"
#include "status.h"

struct llm2_fast_decoder_builder {
  llm2_fast::DecoderBuilder builder;
};

struct llm2_fast_decoder {
  llm2_fast_decoder(llm2_fast::BuiltDecoder built, llm2_fast::Isa isa)
      : embedding(std::move(built.embedding)), decoder(std::move(built.weights), isa) {}

  std::unique_ptr<unsigned char[]> embedding;
  llm2_fast::CheckedDecoder decoder;
};

struct llm2_fast_score_head {
  llm2_fast::ScoreHead head;
};

namespace llm2_fast {
namespace {

template <typename Handle>
Handle& read_handle(const char* name, Handle* handle) {
  if (handle == nullptr) throw argument_error(name, "a handle", "NULL");
  return *handle;
}

template <typename Handle>
void require_out(const char* name, Handle** out) {
  if (out == nullptr) throw argument_error(name, "a pointer to a handle", "NULL");
  *out = nullptr;
}

DecoderSpec read_spec(const llm2_fast_decoder_spec& spec) {
  DecoderSpec read;
  read.dtype = read_dtype("dtype", spec.dtype);
  read.hidden_size = spec.hidden_size;
  read.intermediate_size = spec.intermediate_size;
  read.num_heads = spec.num_heads;
  read.num_kv_heads = spec.num_kv_heads;
  read.head_dim = spec.head_dim;
  read.vocab_size = spec.vocab_size;
  read.rms_norm_eps = spec.rms_norm_eps;
  read.attention_scale = spec.attention_scale;
  read.embedding_scale = 1.0f;
  read.activation = Activation::kSilu;
  require_positive("rms_norm_eps", spec.rms_norm_eps);
  require_positive("attention_scale", spec.attention_scale);
  require_positive("rope_scale", spec.rope_scale);
  require_size("head_dim", spec.head_dim, 1);
  require_pointer("inv_freq", spec.inv_freq, spec.head_dim / 2);
  read.rotary_tables = {{{spec.inv_freq, spec.inv_freq + spec.head_dim / 2}, spec.rope_scale}};
  return read;
}

std::vector<int64_t> read_windows(const llm2_fast_decoder_spec& spec) {
  require_size("num_layers", spec.num_layers, 1);
  if (spec.sliding_windows == nullptr) return std::vector<int64_t>(static_cast<size_t>(spec.num_layers), 0);
  return {spec.sliding_windows, spec.sliding_windows + spec.num_layers};
}

ScoreHead read_head(const llm2_fast_score_head_spec& spec) {
  require_size("hidden_size", spec.hidden_size, 1);
  require_size("num_layers", spec.num_layers, 1);
  require_size("mlp_size", spec.mlp_size, 0);
  require_pointer("layers", spec.layers, spec.num_layers);
  require_pointer("dense_weight", spec.dense_weight, spec.mlp_size);
  require_pointer("dense_bias", spec.dense_bias, spec.mlp_size);
  require_pointer("score_weight", spec.score_weight, 1);
  const int64_t features = spec.hidden_size * spec.num_layers;
  ScoreHead head;
  head.layers.assign(spec.layers, spec.layers + spec.num_layers);
  if (spec.mlp_size > 0) {
    head.dense_weight.assign(spec.dense_weight, spec.dense_weight + spec.mlp_size * features);
    head.dense_bias.assign(spec.dense_bias, spec.dense_bias + spec.mlp_size);
  }
  head.score_weight.assign(spec.score_weight, spec.score_weight + (spec.mlp_size > 0 ? spec.mlp_size : features));
  head.score_bias = spec.score_bias;
  return head;
}

PagedCache read_cache(const llm2_fast_paged_cache* given, const DecoderSpec& spec) {
  const auto cache = read_struct("cache", given);
  require_size("num_blocks", cache.num_blocks, 1);
  require_size("block_size", cache.block_size, 1);
  require_size("num_slots", cache.num_slots, 1);
  require_size("max_blocks", cache.max_blocks, 1);
  const size_t element = static_cast<size_t>(size_of(spec.dtype));
  require_pointer("keys", static_cast<char*>(cache.keys), 1, element);
  require_pointer("values", static_cast<char*>(cache.values), 1, element);
  require_pointer("block_table", cache.block_table, 1);
  require_stride("block_table_row_stride", cache.block_table_row_stride, cache.max_blocks, cache.num_slots);
  require_pointer("hidden_states", static_cast<char*>(cache.hidden_states), 1, element);
  return {cache.keys,         cache.values,     cache.num_blocks,  cache.block_size,
          cache.num_slots,    cache.max_blocks, cache.block_table, cache.block_table_row_stride,
          cache.hidden_states};
}

DecoderRows read_rows(const char* name, const llm2_fast_rows* given) {
  const auto rows = read_struct(name, given);
  require_size("count", rows.count, 0);
  require_pointer("token_ids", rows.token_ids, rows.count);
  require_pointer("slots", rows.slots, rows.count);
  require_pointer("positions", rows.positions, rows.count);
  require_pointer("stored", rows.stored, rows.count);
  const DecoderRows read = {rows.count, rows.token_ids, rows.slots, rows.positions, rows.stored, 0, nullptr};
  check_order(read);
  return read;
}

DecoderRows read_pending(const llm2_fast_rows* given) {
  const DecoderRows pending = read_rows("pending", given);
  for (int64_t i = 0; i < pending.count; ++i) {
    if (pending.stored[i] == 0) throw argument_error("stored", "pending rows that are stored", "a branch");
  }
  return pending;
}

SelectCandidatesArgs read_proposal(const llm2_fast_select_candidates_args& select, const DecoderSpec& spec) {
  require_null("logits", select.logits);
  SelectCandidatesArgs read = read_selection(select);
  read.vocab_size = select.vocab_size == 0 ? spec.vocab_size : select.vocab_size;
  return read;
}

// A pick whose candidates the step provides.
AdjustAndPickArgs read_step_pick(const llm2_fast_adjust_and_pick_args& pick) {
  require_null("candidate_ids", pick.candidate_ids);
  require_null("candidate_logits", pick.candidate_logits);
  require_null("count", pick.count);
  require_null("scores", pick.scores);
  return read_pick(pick);
}

void read_slots(const int32_t* slots, int64_t batch, StepBatch* step) {
  require_pointer("slots", slots, batch);
  require_distinct("slots", slots, batch);
  step->size = batch;
  step->slots = slots;
}

// The selection of a plain step: the largest logit of each row, if the row is usable.
struct LargestLogits {
  std::vector<float> log_alpha, logits, logsumexp;
  std::vector<int32_t> top_k, ids, count;
  std::unique_ptr<bool[]> cut;

  explicit LargestLogits(int64_t batch)
      : log_alpha(static_cast<size_t>(batch), 0.0f),
        logits(log_alpha.size()),
        logsumexp(log_alpha.size()),
        top_k(log_alpha.size(), 0),
        ids(log_alpha.size()),
        count(log_alpha.size()),
        cut(new bool[log_alpha.size()]) {}

  SelectCandidatesArgs args(int64_t vocab_size) {
    SelectCandidatesArgs args = {};
    args.vocab_size = vocab_size;
    args.max_candidates = 1;
    args.log_alpha = log_alpha.data();
    args.candidate_top_k = top_k.data();
    args.ids = ids.data();
    args.candidate_logits = logits.data();
    args.count = count.data();
    args.logsumexp = logsumexp.data();
    args.cut = cut.get();
    return args;
  }
};

}  // namespace
}  // namespace llm2_fast

using namespace llm2_fast;

llm2_fast_status llm2_fast_decoder_builder_create(const llm2_fast_decoder_spec* spec,
                                                  llm2_fast_decoder_builder** builder) {
  return guarded([&] {
    require_out("builder", builder);
    const auto given = read_struct("spec", spec);
    *builder = new llm2_fast_decoder_builder{
        DecoderBuilder(read_spec(given), read_windows(given), given.tie_word_embeddings != 0)};
  });
}

llm2_fast_status llm2_fast_decoder_builder_add(llm2_fast_decoder_builder* builder, const char* name,
                                               llm2_fast_dtype dtype, const int64_t* shape, int32_t ndim,
                                               const void* data) {
  return guarded([&] {
    DecoderBuilder& tensors = read_handle("builder", builder).builder;
    if (name == nullptr) throw argument_error("name", "a string", "NULL");
    require_index("ndim", ndim, 3);
    require_pointer("shape", shape, ndim);
    const DType read = read_dtype("dtype", dtype);
    require_pointer("data", static_cast<const char*>(data), 1, static_cast<size_t>(size_of(read)));
    tensors.add(name, read, {shape, shape + ndim}, data);
  });
}

llm2_fast_status llm2_fast_decoder_builder_finish(llm2_fast_decoder_builder* builder, int32_t num_threads,
                                                  llm2_fast_decoder** decoder) {
  return guarded([&] {
    require_out("decoder", decoder);
    DecoderBuilder& tensors = read_handle("builder", builder).builder;
    require_at_least("num_threads", num_threads, 1);
    const Isa isa = active_isa();
    *decoder = new llm2_fast_decoder(tensors.finish(isa, num_threads), isa);
  });
}

void llm2_fast_decoder_builder_destroy(llm2_fast_decoder_builder* builder) {
  delete builder;
}

void llm2_fast_decoder_destroy(llm2_fast_decoder* decoder) {
  delete decoder;
}

llm2_fast_status llm2_fast_score_head_create(const llm2_fast_score_head_spec* spec, llm2_fast_score_head** head) {
  return guarded([&] {
    require_out("head", head);
    *head = new llm2_fast_score_head{read_head(read_struct("spec", spec))};
  });
}

void llm2_fast_score_head_destroy(llm2_fast_score_head* head) {
  delete head;
}

llm2_fast_status llm2_fast_decoder_forward(llm2_fast_decoder* decoder, const llm2_fast_paged_cache* cache,
                                           const llm2_fast_rows* rows, const llm2_fast_score_head* head, float* scores,
                                           int32_t num_threads) {
  return guarded([&] {
    CheckedDecoder& checked = read_handle("decoder", decoder).decoder;
    const PagedCache view = read_cache(cache, checked.spec());
    const DecoderRows pass = read_rows("rows", rows);
    require_pointer("scores", scores, head == nullptr ? 0 : pass.count);
    checked.forward(view, pass, head == nullptr ? nullptr : &head->head, scores, num_threads);
  });
}

llm2_fast_status llm2_fast_decoder_keep_row(llm2_fast_decoder* decoder, const llm2_fast_paged_cache* cache,
                                            int64_t row) {
  return guarded([&] {
    CheckedDecoder& checked = read_handle("decoder", decoder).decoder;
    checked.keep_row(read_cache(cache, checked.spec()), row);
  });
}

llm2_fast_status llm2_fast_decoder_propose(llm2_fast_decoder* decoder, const llm2_fast_paged_cache* cache,
                                           const llm2_fast_rows* pending, const int32_t* slots,
                                           const llm2_fast_select_candidates_args* select, int32_t num_threads) {
  return guarded([&] {
    CheckedDecoder& checked = read_handle("decoder", decoder).decoder;
    const PagedCache view = read_cache(cache, checked.spec());
    const DecoderRows pass = read_pending(pending);
    const auto selection = read_struct("select", select);
    StepBatch step = {};
    step.select = read_proposal(selection, checked.spec());
    read_slots(slots, selection.batch_size, &step);
    checked.propose(view, pass, step, num_threads);
  });
}

llm2_fast_status llm2_fast_decoder_plain_step(llm2_fast_decoder* decoder, const llm2_fast_paged_cache* cache,
                                              const llm2_fast_rows* pending, const int32_t* slots,
                                              const llm2_fast_adjust_and_pick_args* pick, int32_t num_threads) {
  return guarded([&] {
    CheckedDecoder& checked = read_handle("decoder", decoder).decoder;
    const PagedCache view = read_cache(cache, checked.spec());
    const DecoderRows pass = read_pending(pending);
    const auto given = read_struct("pick", pick);
    StepBatch step = {};
    step.pick = read_step_pick(given);
    read_slots(slots, given.batch_size, &step);
    if (given.seen != nullptr && given.batch_size > 1) {
      require_equal("seen_row_stride", given.seen_row_stride, checked.spec().vocab_size);
    }
    step.seen = given.seen;
    LargestLogits largest(given.batch_size);
    step.select = largest.args(checked.spec().vocab_size);
    checked.plain_step(view, pass, step, num_threads);
  });
}

llm2_fast_status llm2_fast_decoder_joint_step(llm2_fast_decoder* decoder, const llm2_fast_paged_cache* cache,
                                              const llm2_fast_score_head* head, const llm2_fast_joint_step* step,
                                              int32_t num_threads) {
  return guarded([&] {
    CheckedDecoder& checked = read_handle("decoder", decoder).decoder;
    const PagedCache view = read_cache(cache, checked.spec());
    const ScoreHead& scorer = read_handle("head", head).head;
    const auto given = read_struct("step", step);
    const auto select = read_struct("select", given.select);
    const auto pick = read_struct("pick", given.pick);
    require_equal("batch_size of select", select.batch_size, given.batch_size);
    require_equal("batch_size of pick", pick.batch_size, given.batch_size);
    require_null("seen", pick.seen);
    StepBatch batch = {};
    batch.select = read_proposal(select, checked.spec());
    batch.pick = read_step_pick(pick);
    read_slots(given.slots, given.batch_size, &batch);
    require_pointer("lengths", given.lengths, given.batch_size);
    require_pointer("scores", given.scores, given.batch_size);
    batch.lengths = given.lengths;
    batch.seen = given.seen;
    batch.scores = given.scores;
    checked.joint_step(view, scorer, nullptr, batch, num_threads);
  });
}
