#include "arguments.h"

#include <algorithm>

namespace llm2_fast {

DType read_dtype(const std::string& name, llm2_fast_dtype dtype, Device device) {
  if (dtype == LLM2_FAST_FLOAT32) return DType::kFloat32;
  if (dtype == LLM2_FAST_BFLOAT16) return DType::kBFloat16;
  if (dtype == LLM2_FAST_FLOAT16 && device == Device::kCuda) return DType::kFloat16;
  throw argument_error(name, "LLM2_FAST_FLOAT32 or LLM2_FAST_BFLOAT16", std::to_string(dtype));
}

SelectCandidatesArgs read_selection(const llm2_fast_select_candidates_args& args) {
  const int64_t batch = args.batch_size;
  require_size("batch_size", batch, 0);
  require_size("max_candidates", args.max_candidates, 1);
  require_pointer("log_alpha", args.log_alpha, batch);
  require_pointer("candidate_top_k", args.candidate_top_k, batch);
  require_pointer("ids", args.ids, batch);
  require_pointer("candidate_logits", args.candidate_logits, batch);
  require_pointer("count", args.count, batch);
  require_pointer("logsumexp", args.logsumexp, batch);
  require_pointer("cut", args.cut, batch);

  SelectCandidatesArgs read = {};
  read.max_candidates = args.max_candidates;
  read.log_alpha = args.log_alpha;
  read.candidate_top_k = args.candidate_top_k;
  read.ids = args.ids;
  read.candidate_logits = args.candidate_logits;
  read.count = args.count;
  read.logsumexp = args.logsumexp;
  read.cut = args.cut;
  return read;
}

AdjustAndPickArgs read_pick(const llm2_fast_adjust_and_pick_args& args) {
  const int64_t batch = args.batch_size;
  require_size("batch_size", batch, 0);
  require_size("max_candidates", args.max_candidates, 1);
  require_size("num_eos", args.num_eos, 0);
  require_pointer("beta", args.beta, batch);
  require_pointer("repetition_penalty", args.repetition_penalty, batch);
  require_pointer("temperature", args.temperature, batch);
  require_pointer("top_k", args.top_k, batch);
  require_pointer("top_p", args.top_p, batch);
  require_pointer("log_min_p", args.log_min_p, batch);
  require_pointer("seed", args.seed, batch);
  require_pointer("step", args.step, batch);
  require_pointer("sample_index", args.sample_index, batch);
  require_pointer("request_id", args.request_id, batch);
  require_pointer("eos_token_ids", args.eos_token_ids, batch * args.num_eos);
  require_stride_or_zero("eos_token_ids_row_stride", args.eos_token_ids_row_stride, args.num_eos, batch);
  require_pointer("index", args.index, batch);
  require_pointer("token", args.token, batch);
  require_pointer("logprob", args.logprob, batch);
  require_pointer("system1_index", args.system1_index, batch);
  require_pointer("adjusted", args.adjusted, batch);
  require_pointer("finished", args.finished, batch);

  AdjustAndPickArgs read = {};
  read.max_candidates = args.max_candidates;
  read.num_eos = args.num_eos;
  read.beta = args.beta;
  read.repetition_penalty = args.repetition_penalty;
  read.temperature = args.temperature;
  read.top_k = args.top_k;
  read.top_p = args.top_p;
  read.log_min_p = args.log_min_p;
  read.seed = args.seed;
  read.step = args.step;
  read.sample_index = args.sample_index;
  read.request_id = args.request_id;
  read.eos_token_ids = args.eos_token_ids;
  read.eos_token_ids_row_stride = args.eos_token_ids_row_stride;
  read.index = args.index;
  read.token = args.token;
  read.logprob = args.logprob;
  read.system1_index = args.system1_index;
  read.adjusted = args.adjusted;
  read.finished = args.finished;
  return read;
}

SelectCandidatesArgs read_args(const llm2_fast_select_candidates_args& args, Device device) {
  SelectCandidatesArgs read = read_selection(args);
  require_size("vocab_size", args.vocab_size, 1);
  read.vocab_size = args.vocab_size;
  read.dtype = read_dtype("dtype", args.dtype, device);
  require_pointer("logits", static_cast<const char*>(args.logits), args.batch_size,
                  static_cast<size_t>(size_of(read.dtype)));
  require_stride("logits_row_stride", args.logits_row_stride, args.vocab_size, args.batch_size);
  read.logits = args.logits;
  read.logits_row_stride = args.logits_row_stride;
  return read;
}

AdjustAndPickArgs read_args(const llm2_fast_adjust_and_pick_args& args) {
  AdjustAndPickArgs read = read_pick(args);
  const int64_t batch = args.batch_size, width = args.max_candidates;
  require_pointer("candidate_ids", args.candidate_ids, batch);
  require_stride_or_zero("candidate_ids_row_stride", args.candidate_ids_row_stride, width, batch);
  require_pointer("candidate_logits", args.candidate_logits, batch);
  require_stride("candidate_logits_row_stride", args.candidate_logits_row_stride, width, batch);
  require_pointer("count", args.count, batch);
  if (args.scores != nullptr) require_stride("scores_row_stride", args.scores_row_stride, width, batch);
  if (args.seen != nullptr) require_stride("seen_row_stride", args.seen_row_stride, width, batch);
  read.candidate_ids = args.candidate_ids;
  read.candidate_ids_row_stride = args.candidate_ids_row_stride;
  read.candidate_logits = args.candidate_logits;
  read.candidate_logits_row_stride = args.candidate_logits_row_stride;
  read.count = args.count;
  read.scores = args.scores;
  read.scores_row_stride = args.scores_row_stride;
  read.seen = args.seen;
  read.seen_row_stride = args.seen_row_stride;
  return read;
}

namespace {

void check_attention_sizes(const llm2_fast_branch_attention_args& args) {
  require_size("num_rows", args.num_rows, 0);
  require_size("num_sequences", args.num_sequences, 0);
  require_size("max_blocks", args.max_blocks, 0);
  require_size("num_blocks", args.num_blocks, 0);
  require_size("num_kv_heads", args.num_kv_heads, 1);
  require_size("num_heads", args.num_heads, 1);
  require_size("head_dim", args.head_dim, 1);
  require_size("block_size", args.block_size, 1);
  require_size("sliding_window", args.sliding_window, 0);
  if (args.num_heads % args.num_kv_heads != 0) {
    throw argument_error("num_heads", "a multiple of num_kv_heads = " + std::to_string(args.num_kv_heads),
                         std::to_string(args.num_heads));
  }
}

void check_attention_tensors(const llm2_fast_branch_attention_args& args, size_t element) {
  const int64_t rows = args.num_rows, blocks = args.num_blocks, dim = args.head_dim;
  const auto tensor = [&](const char* name, const void* data, int64_t count) {
    require_pointer(name, static_cast<const char*>(data), count, element);
  };
  tensor("query", args.query, rows);
  require_stride("query_row_stride", args.query_row_stride, dim, rows);
  require_stride("query_head_stride", args.query_head_stride, dim, args.num_heads);
  tensor("key_cache", args.key_cache, blocks);
  require_stride("key_block_stride", args.key_block_stride, dim, blocks);
  require_stride("key_head_stride", args.key_head_stride, dim, args.num_kv_heads);
  require_stride("key_position_stride", args.key_position_stride, dim, args.block_size);
  tensor("value_cache", args.value_cache, blocks);
  require_stride("value_block_stride", args.value_block_stride, dim, blocks);
  require_stride("value_head_stride", args.value_head_stride, dim, args.num_kv_heads);
  require_stride("value_position_stride", args.value_position_stride, dim, args.block_size);
  require_pointer("block_table", args.block_table, args.num_sequences * args.max_blocks);
  require_stride("block_table_row_stride", args.block_table_row_stride, args.max_blocks, args.num_sequences);
  require_pointer("row_sequence", args.row_sequence, rows);
  require_pointer("row_prefix_length", args.row_prefix_length, rows);
  require_pointer("row_has_own", args.row_has_own, rows);
  const int64_t own = std::count_if(args.row_has_own, args.row_has_own + rows, [](uint8_t flag) { return flag != 0; });
  tensor("own_key", args.own_key, own);
  require_stride("own_key_row_stride", args.own_key_row_stride, dim, rows);
  require_stride("own_key_head_stride", args.own_key_head_stride, dim, args.num_kv_heads);
  tensor("own_value", args.own_value, own);
  require_stride("own_value_row_stride", args.own_value_row_stride, dim, rows);
  require_stride("own_value_head_stride", args.own_value_head_stride, dim, args.num_kv_heads);
  tensor("output", args.output, rows);
}

}  // namespace

BranchAttentionArgs read_args(const llm2_fast_branch_attention_args& args) {
  check_attention_sizes(args);
  BranchAttentionArgs read = {};
  read.dtype = read_dtype("dtype", args.dtype);
  check_attention_tensors(args, static_cast<size_t>(size_of(read.dtype)));
  read.num_heads = args.num_heads;
  read.num_kv_heads = args.num_kv_heads;
  read.head_dim = args.head_dim;
  read.block_size = args.block_size;
  read.query = args.query;
  read.query_row_stride = args.query_row_stride;
  read.query_head_stride = args.query_head_stride;
  read.key_cache = args.key_cache;
  read.key_block_stride = args.key_block_stride;
  read.key_head_stride = args.key_head_stride;
  read.key_position_stride = args.key_position_stride;
  read.value_cache = args.value_cache;
  read.value_block_stride = args.value_block_stride;
  read.value_head_stride = args.value_head_stride;
  read.value_position_stride = args.value_position_stride;
  read.block_table = args.block_table;
  read.block_table_row_stride = args.block_table_row_stride;
  read.row_sequence = args.row_sequence;
  read.row_prefix_length = args.row_prefix_length;
  read.row_has_own = args.row_has_own;
  read.own_key = args.own_key;
  read.own_key_row_stride = args.own_key_row_stride;
  read.own_key_head_stride = args.own_key_head_stride;
  read.own_value = args.own_value;
  read.own_value_row_stride = args.own_value_row_stride;
  read.own_value_head_stride = args.own_value_head_stride;
  read.scale = args.scale;
  read.sliding_window = args.sliding_window;
  read.output = args.output;
  check_attention_rows(read, args.num_rows, args.num_sequences, args.max_blocks, args.num_blocks);
  return read;
}

namespace {

void check_commit_sizes(const llm2_fast_commit_args& args) {
  require_size("batch_size", args.batch_size, 0);
  require_size("num_rows", args.num_rows, 0);
  require_size("num_layers", args.num_layers, 1);
  require_size("num_kv_heads", args.num_kv_heads, 1);
  require_size("head_dim", args.head_dim, 1);
  require_size("hidden_size", args.hidden_size, args.hidden == nullptr ? 0 : 1);
  require_size("num_blocks", args.num_blocks, 1);
  require_size("block_size", args.block_size, 1);
  require_size("num_slots", args.num_slots, 1);
  require_size("max_blocks", args.max_blocks, 1);
}

}  // namespace

CommitArgs read_args(const llm2_fast_commit_args& args, Device device) {
  check_commit_sizes(args);
  CommitArgs read = {};
  read.dtype = read_dtype("dtype", args.dtype, device);
  const auto tensor = [&](const char* name, const void* data, int64_t count) {
    require_pointer(name, static_cast<const char*>(data), count, static_cast<size_t>(size_of(read.dtype)));
  };
  const int64_t batch = args.batch_size;
  require_pointer("index", args.index, batch);
  require_pointer("first_row", args.first_row, batch);
  require_pointer("slots", args.slots, batch);
  tensor("own_key", args.own_key, batch * args.num_rows);
  tensor("own_value", args.own_value, batch * args.num_rows);
  tensor("keys", args.keys, batch);
  tensor("values", args.values, batch);
  require_pointer("block_table", args.block_table, batch);
  require_stride("block_table_row_stride", args.block_table_row_stride, args.max_blocks, args.num_slots);
  tensor("hidden_states", args.hidden_states, args.hidden == nullptr ? 0 : batch);
  tensor("hidden", args.hidden, args.hidden_states == nullptr ? 0 : batch);
  require_pointer("lengths", args.lengths, batch);
  read.num_rows = args.num_rows;
  read.num_layers = args.num_layers;
  read.num_kv_heads = args.num_kv_heads;
  read.head_dim = args.head_dim;
  read.hidden_size = args.hidden_size;
  read.num_blocks = args.num_blocks;
  read.block_size = args.block_size;
  read.index = args.index;
  read.first_row = args.first_row;
  read.slots = args.slots;
  read.own_key = args.own_key;
  read.own_value = args.own_value;
  read.hidden = args.hidden;
  read.keys = args.keys;
  read.values = args.values;
  read.block_table = args.block_table;
  read.block_table_row_stride = args.block_table_row_stride;
  read.hidden_states = args.hidden_states;
  read.lengths = args.lengths;
  return read;
}

}  // namespace llm2_fast
