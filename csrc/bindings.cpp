// The Python module llm2_fast_C: checks arguments, releases the interpreter lock and calls the ops.
//
// Tensors come as DLPack capsules. Arguments have the names, order, shapes and dtypes of llm2_fast/reference.py;
// outputs are allocated by the caller. Whatever does not fit raises ValueError before anything is computed.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "arguments.h"
#include "decoder_bindings.h"
#include "llm2_fast/isa.h"
#include "llm2_fast/ops.h"

namespace llm2_fast {
namespace {

namespace py = pybind11;

void select_candidates_py(py::handle logits, py::handle log_alpha, py::handle candidate_top_k, int64_t max_candidates,
                          py::handle ids, py::handle candidate_logits, py::handle count, py::handle logsumexp,
                          py::handle cut, const OptionalIsa& isa) {
  const TensorArgument z("logits", logits, {"float32", "bfloat16"}, 2);
  const int64_t batch = z.size(0);
  require_at_least("size of the vocabulary in logits", z.size(1), 1);
  require_at_least("max_candidates", max_candidates, 1);
  const VectorArgument log_alphas("log_alpha", log_alpha, "float32", batch);
  const VectorArgument top_ks("candidate_top_k", candidate_top_k, "int32", batch);
  const MatrixArgument ids_out("ids", ids, "int32", batch, max_candidates, Access::kWrite);
  const MatrixArgument logits_out("candidate_logits", candidate_logits, "float32", batch, max_candidates,
                                  Access::kWrite);
  const VectorArgument count_out("count", count, "int32", batch, Access::kWrite);
  const VectorArgument logsumexp_out("logsumexp", logsumexp, "float32", batch, Access::kWrite);
  const VectorArgument cut_out("cut", cut, "bool", batch, Access::kWrite);

  SelectCandidatesArgs args = {};
  args.vocab_size = z.size(1);
  args.max_candidates = max_candidates;
  args.dtype = float_dtype(z);
  args.logits = z.data<void>();
  args.logits_row_stride = z.stride(0);
  args.log_alpha = log_alphas.data<float>();
  args.candidate_top_k = top_ks.data<int32_t>();
  args.ids = ids_out.data<int32_t>();
  args.candidate_logits = logits_out.data<float>();
  args.count = count_out.data<int32_t>();
  args.logsumexp = logsumexp_out.data<float>();
  args.cut = cut_out.data<bool>();

  const Isa tier = chosen_isa(isa);
  const py::gil_scoped_release release;
  select_candidates(args, {0, batch}, tier);
}

void adjust_and_pick_py(py::handle candidate_ids, py::handle candidate_logits, py::handle count, py::handle scores,
                        py::handle beta, py::handle seen, py::handle repetition_penalty, py::handle temperature,
                        py::handle top_k, py::handle top_p, py::handle log_min_p, py::handle seed, py::handle step,
                        py::handle sample_index, py::handle request_id, py::handle eos_token_ids, py::handle index,
                        py::handle token, py::handle logprob, py::handle system1_index, py::handle adjusted,
                        py::handle finished, const OptionalIsa& isa) {
  const TensorArgument ids("candidate_ids", candidate_ids, {"int32"}, 2);
  const int64_t batch = ids.size(0), columns = ids.size(1);
  require_at_least("number of candidates in candidate_ids", columns, 1);
  const MatrixArgument logits("candidate_logits", candidate_logits, "float32", batch, columns);
  const VectorArgument counts("count", count, "int32", batch);
  const OptionalMatrixArgument score_rows("scores", scores, "float32", batch, columns);
  const VectorArgument betas("beta", beta, "float32", batch);
  const OptionalMatrixArgument seen_rows("seen", seen, "bool", batch, columns);
  const VectorArgument penalties("repetition_penalty", repetition_penalty, "float32", batch);
  const VectorArgument temperatures("temperature", temperature, "float32", batch);
  const VectorArgument top_ks("top_k", top_k, "int32", batch);
  const VectorArgument top_ps("top_p", top_p, "float32", batch);
  const VectorArgument log_min_ps("log_min_p", log_min_p, "float32", batch);
  const VectorArgument seeds("seed", seed, "int64", batch);
  const VectorArgument steps("step", step, "int32", batch);
  const VectorArgument sample_indices("sample_index", sample_index, "int32", batch);
  const VectorArgument request_ids("request_id", request_id, "int32", batch);
  const TensorArgument eos("eos_token_ids", eos_token_ids, {"int32"}, 2);
  eos.require_shape({batch, eos.size(1)});
  const VectorArgument index_out("index", index, "int32", batch, Access::kWrite);
  const VectorArgument token_out("token", token, "int32", batch, Access::kWrite);
  const VectorArgument logprob_out("logprob", logprob, "float32", batch, Access::kWrite);
  const VectorArgument system1_index_out("system1_index", system1_index, "int32", batch, Access::kWrite);
  const MatrixArgument adjusted_out("adjusted", adjusted, "float32", batch, columns, Access::kWrite);
  const VectorArgument finished_out("finished", finished, "bool", batch, Access::kWrite);

  AdjustAndPickArgs args = {};
  args.max_candidates = columns;
  args.num_eos = eos.size(1);
  args.candidate_ids = ids.data<int32_t>();
  args.candidate_ids_row_stride = ids.stride(0);
  args.candidate_logits = logits.data<float>();
  args.candidate_logits_row_stride = logits.stride(0);
  args.count = counts.data<int32_t>();
  args.scores = score_rows.data<float>();
  args.scores_row_stride = score_rows.stride(0);
  args.beta = betas.data<float>();
  args.seen = seen_rows.data<uint8_t>();
  args.seen_row_stride = seen_rows.stride(0);
  args.repetition_penalty = penalties.data<float>();
  args.temperature = temperatures.data<float>();
  args.top_k = top_ks.data<int32_t>();
  args.top_p = top_ps.data<float>();
  args.log_min_p = log_min_ps.data<float>();
  args.seed = seeds.data<int64_t>();
  args.step = steps.data<int32_t>();
  args.sample_index = sample_indices.data<int32_t>();
  args.request_id = request_ids.data<int32_t>();
  args.eos_token_ids = eos.data<int32_t>();
  args.eos_token_ids_row_stride = eos.stride(0);
  args.index = index_out.data<int32_t>();
  args.token = token_out.data<int32_t>();
  args.logprob = logprob_out.data<float>();
  args.system1_index = system1_index_out.data<int32_t>();
  args.adjusted = adjusted_out.data<float>();
  args.finished = finished_out.data<bool>();

  const Isa tier = chosen_isa(isa);
  const py::gil_scoped_release release;
  adjust_and_pick(args, {0, batch}, tier);
}

void branch_attention_py(py::handle query, py::handle key_cache, py::handle value_cache, py::handle block_table,
                         py::handle row_sequence, py::handle row_prefix_length, py::handle row_has_own,
                         py::handle own_key, py::handle own_value, double scale, int64_t sliding_window,
                         py::handle output, const OptionalIsa& isa) {
  const TensorArgument q("query", query, {"float32", "bfloat16"}, 3);
  const char* dtype = q.dtype() == "float32" ? "float32" : "bfloat16";
  const int64_t rows = q.size(0), num_heads = q.size(1), head_dim = q.size(2);
  const TensorArgument keys("key_cache", key_cache, {dtype}, 4);
  const int64_t num_blocks = keys.size(0), num_kv_heads = keys.size(1), block_size = keys.size(2);
  keys.require_shape({num_blocks, num_kv_heads, block_size, head_dim});
  const TensorArgument values("value_cache", value_cache, {dtype}, 4);
  values.require_shape({num_blocks, num_kv_heads, block_size, head_dim});
  require_at_least("head_dim of query", head_dim, 1);
  require_at_least("num_kv_heads of key_cache", num_kv_heads, 1);
  require_at_least("block_size of key_cache", block_size, 1);
  require_at_least("sliding_window", sliding_window, 0);
  if (num_heads < 1 || num_heads % num_kv_heads != 0) {
    throw argument_error("num_heads of query", "a multiple of num_kv_heads = " + std::to_string(num_kv_heads),
                         std::to_string(num_heads));
  }
  const TensorArgument blocks("block_table", block_table, {"int32"}, 2);
  const VectorArgument sequences("row_sequence", row_sequence, "int32", rows);
  const VectorArgument lengths("row_prefix_length", row_prefix_length, "int32", rows);
  const VectorArgument has_own("row_has_own", row_has_own, "bool", rows);
  const TensorArgument own_keys("own_key", own_key, {dtype}, 3);
  own_keys.require_shape({rows, num_kv_heads, head_dim});
  const TensorArgument own_values("own_value", own_value, {dtype}, 3);
  own_values.require_shape({rows, num_kv_heads, head_dim});
  const TensorArgument out("output", output, {dtype}, 3, Access::kWrite);
  out.require_shape({rows, num_heads, head_dim}).require_contiguous();

  BranchAttentionArgs args = {};
  args.num_heads = num_heads;
  args.num_kv_heads = num_kv_heads;
  args.head_dim = head_dim;
  args.block_size = block_size;
  args.dtype = float_dtype(q);
  args.query = q.data<void>();
  args.query_row_stride = q.stride(0);
  args.query_head_stride = q.stride(1);
  args.key_cache = keys.data<void>();
  args.key_block_stride = keys.stride(0);
  args.key_head_stride = keys.stride(1);
  args.key_position_stride = keys.stride(2);
  args.value_cache = values.data<void>();
  args.value_block_stride = values.stride(0);
  args.value_head_stride = values.stride(1);
  args.value_position_stride = values.stride(2);
  args.block_table = blocks.data<int32_t>();
  args.block_table_row_stride = blocks.stride(0);
  args.row_sequence = sequences.data<int32_t>();
  args.row_prefix_length = lengths.data<int32_t>();
  args.row_has_own = has_own.data<uint8_t>();
  args.own_key = own_keys.data<void>();
  args.own_key_row_stride = own_keys.stride(0);
  args.own_key_head_stride = own_keys.stride(1);
  args.own_value = own_values.data<void>();
  args.own_value_row_stride = own_values.stride(0);
  args.own_value_head_stride = own_values.stride(1);
  args.scale = static_cast<float>(scale);
  args.sliding_window = sliding_window;
  args.output = out.data<void>();

  const Isa tier = chosen_isa(isa);
  const py::gil_scoped_release release;
  check_attention_rows(args, rows, blocks.size(0), blocks.size(1), num_blocks);
  branch_attention(args, {0, rows}, tier);
}

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (Isa isa : runnable_isas()) names.push_back(isa_name(isa));
  return names;
}

}  // namespace

PYBIND11_MODULE(llm2_fast_C, module) {
  module.doc() = "CPU ops of llm2_fast on DLPack capsules; see llm2_fast.ops for the functions to call.";
  module.def(
      "cpu_isa", [] { return isa_name(active_isa()); },
      "Instruction-set tier in use: 'portable', 'avx2', 'avx512' or 'avx512_bf16'. The environment variable "
      "LLM2_FAST_CPU_ISA "
      "caps it; a tier that cannot run here raises ValueError.");
  module.def("cpu_isas", &cpu_isas, "The tiers that this build and CPU can run, lowest first.");

  using py::arg;
  module.def("select_candidates", &select_candidates_py, arg("logits"), arg("log_alpha"), arg("candidate_top_k"),
             arg("max_candidates"), arg("ids"), arg("candidate_logits"), arg("count"), arg("logsumexp"), arg("cut"),
             arg("isa") = py::none());
  module.def("adjust_and_pick", &adjust_and_pick_py, arg("candidate_ids"), arg("candidate_logits"), arg("count"),
             arg("scores"), arg("beta"), arg("seen"), arg("repetition_penalty"), arg("temperature"), arg("top_k"),
             arg("top_p"), arg("log_min_p"), arg("seed"), arg("step"), arg("sample_index"), arg("request_id"),
             arg("eos_token_ids"), arg("index"), arg("token"), arg("logprob"), arg("system1_index"), arg("adjusted"),
             arg("finished"), arg("isa") = py::none());
  module.def("branch_attention", &branch_attention_py, arg("query"), arg("key_cache"), arg("value_cache"),
             arg("block_table"), arg("row_sequence"), arg("row_prefix_length"), arg("row_has_own"), arg("own_key"),
             arg("own_value"), arg("scale"), arg("sliding_window"), arg("output"), arg("isa") = py::none());
  bind_decoder(module);
}

}  // namespace llm2_fast
