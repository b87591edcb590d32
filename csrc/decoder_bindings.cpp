// Python classes around the decoder: they check arguments, keep tensors alive and release the interpreter lock.
#include "decoder_bindings.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "arguments.h"
#include "dlpack.h"
#include "llm2_fast/checked_decoder.h"
#include "llm2_fast/checks.h"

namespace llm2_fast {
namespace {

namespace py = pybind11;
using Tokens = std::vector<int32_t>;
using Flags = std::vector<uint8_t>;
using PackedPtr = std::shared_ptr<PackedLinear>;

std::vector<float> float_vector(const char* name, py::handle capsule, int64_t size) {
  const VectorArgument vector(name, capsule, "float32", size);
  return {vector.data<float>(), vector.data<float>() + size};
}

std::vector<float> optional_vector(const char* name, py::handle capsule, int64_t size) {
  return capsule.is_none() ? std::vector<float>() : float_vector(name, capsule, size);
}

// --- PackedLinear ----------------------------------------------------------------------------------------------------

void require_shape_of_layer(const std::string& dtype, int64_t in_features, int64_t out_features, bool interleaved) {
  if (dtype != "float32" && dtype != "bfloat16") throw argument_error("dtype", "float32 or bfloat16", dtype);
  require_at_least("in_features", in_features, 1);
  require_at_least("out_features", out_features, 1);
  if (interleaved) require_equal("out_features % 2", out_features % 2, 0);
}

const char* dtype_name(const PackedLinear& linear) {
  return linear.dtype() == DType::kFloat32 ? "float32" : "bfloat16";
}

Arrangement arrangement_of(bool interleaved) {
  return interleaved ? Arrangement::kInterleaved : Arrangement::kStacked;
}

void require_group_size(int64_t group_size, int64_t in_features) {
  require_at_least("group_size", group_size, 0);
  if (group_size % 2 != 0 && group_size < in_features) {
    throw argument_error("group_size", "an even number or at least in_features", std::to_string(group_size));
  }
}

PackedPtr make_packed_linear(const std::vector<py::object>& weights, const std::vector<py::object>& biases,
                             bool interleaved, int num_threads, const OptionalIsa& isa, int64_t group_size) {
  require_at_least("num_threads", num_threads, 1);
  if (weights.empty() || weights.size() != biases.size() || (interleaved && weights.size() != 2)) {
    throw argument_error("weights", "one or more, as many as biases, and two to interleave",
                         std::to_string(weights.size()) + " weights, " + std::to_string(biases.size()) + " biases");
  }
  std::vector<std::unique_ptr<TensorArgument>> tensors, bias_tensors;
  std::vector<WeightView> views;
  for (size_t i = 0; i < weights.size(); ++i) {
    tensors.emplace_back(new TensorArgument("weights", weights[i], {"float32", "bfloat16"}, 2));
    const TensorArgument &weight = *tensors.back(), &first = *tensors.front();
    require_equal("in_features of weights", weight.size(1), first.size(1));
    if (interleaved) require_equal("out_features of weights", weight.size(0), first.size(0));
    if (weight.dtype() != first.dtype()) throw argument_error("weights", first.dtype(), weight.dtype());
    const float* bias = nullptr;
    if (!biases[i].is_none()) {
      bias_tensors.emplace_back(new VectorArgument("biases", biases[i], "float32", weight.size(0)));
      bias = bias_tensors.back()->data<float>();
    }
    views.push_back({weight.data<void>(), weight.size(0), weight.stride(0), bias});
  }
  const TensorArgument& first = *tensors.front();
  require_at_least("in_features of weights", first.size(1), 1);
  require_group_size(group_size, first.size(1));
  require_at_least("out_features of weights", first.size(0), 1);
  const Isa tier = chosen_isa(isa);
  const Arrangement arrangement = arrangement_of(interleaved);
  const py::gil_scoped_release release;
  return std::make_shared<PackedLinear>(float_dtype(first), views, first.size(1), arrangement, tier, num_threads,
                                        group_size);
}

PackedPtr make_unpacked(const std::string& dtype, int64_t in_features, int64_t out_features, bool interleaved,
                        const OptionalIsa& isa, int64_t group_size) {
  require_shape_of_layer(dtype, in_features, out_features, interleaved);
  require_group_size(group_size, in_features);
  return std::make_shared<PackedLinear>(dtype == "float32" ? DType::kFloat32 : DType::kBFloat16, in_features,
                                        out_features, arrangement_of(interleaved), chosen_isa(isa), group_size);
}

void pack_rows_py(PackedLinear& linear, int64_t first, const std::vector<py::object>& weights, int num_threads) {
  require_at_least("num_threads", num_threads, 1);
  if (!linear.packed_here()) throw argument_error("linear", "one made by unpacked", "one over buffers");
  const size_t count = linear.arrangement() == Arrangement::kStacked ? 1 : 2;
  require_equal("number of weights", static_cast<int64_t>(weights.size()), static_cast<int64_t>(count));
  const int64_t out_features = linear.out_features() / static_cast<int64_t>(count);
  std::vector<std::unique_ptr<TensorArgument>> tensors;
  std::vector<WeightView> views;
  for (const py::object& capsule : weights) {
    const char* dtype = dtype_name(linear);
    tensors.emplace_back(new TensorArgument("weights", capsule, {dtype}, 2));
    const TensorArgument& weight = *tensors.back();
    weight.require_shape({tensors.front()->size(0), linear.in_features()});
    views.push_back({weight.data<void>(), weight.size(0), weight.stride(0), nullptr});
  }
  const int64_t end = first + tensors.front()->size(0), piece = linear.piece_rows();
  if (first < 0 || first % piece != 0 || end > out_features || (end % piece != 0 && end != out_features)) {
    throw argument_error("rows", "those from one multiple of " + std::to_string(piece) + " to another or to the end",
                         std::to_string(first) + " to " + std::to_string(end));
  }
  const py::gil_scoped_release release;
  linear.pack_rows(first, views, num_threads);
}

void require_stacked(const PackedLinear& linear) {
  if (linear.arrangement() != Arrangement::kStacked) throw argument_error("linear", "stacked weights", "interleaved");
}

void unpack_row_py(const PackedLinear& linear, int64_t row, py::handle output) {
  const VectorArgument weights("output", output, "float32", linear.in_features(), Access::kWrite);
  require_index("row", row, linear.out_features());
  require_stacked(linear);
  linear.unpack_row(row, weights.data<float>());
}

// A buffer as a DLPack capsule, which torch reads without a copy. It must not be written to.
py::capsule export_buffer(const PackedBuffer& buffer, const PackedPtr& owner) {
  struct Export {
    DLManagedTensor managed;
    int64_t size;
    PackedPtr owner;
  };
  auto* exported = new Export{{}, buffer.size, owner};
  const uint8_t code = buffer.dtype == DType::kFloat32    ? kDLFloat
                       : buffer.dtype == DType::kBFloat16 ? kDLBfloat
                                                          : kDLInt;
  exported->managed.dl_tensor = {const_cast<void*>(buffer.data),
                                 {kDLCPU, 0},
                                 1,
                                 {code, static_cast<uint8_t>(8 * size_of(buffer.dtype)), 1},
                                 &exported->size,
                                 nullptr,
                                 0};
  exported->managed.manager_ctx = exported;
  exported->managed.deleter = [](DLManagedTensor* self) { delete static_cast<Export*>(self->manager_ctx); };
  return py::capsule(&exported->managed, "dltensor", [](PyObject* capsule) {
    if (!PyCapsule_IsValid(capsule, "dltensor")) return;  // consumed: its new owner calls the deleter
    auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
    managed->deleter(managed);
  });
}

py::dict buffers_py(const PackedPtr& linear) {
  py::dict capsules;
  for (const PackedBuffer& buffer : linear->buffers()) {
    capsules[py::str(buffer.name)] = export_buffer(buffer, linear);
  }
  return capsules;
}

py::dict layout_py(const PackedLinear& linear) {
  py::dict layout;
  layout["dtype"] = dtype_name(linear);
  layout["in_features"] = linear.in_features();
  layout["out_features"] = linear.out_features();
  layout["interleaved"] = linear.arrangement() == Arrangement::kInterleaved;
  layout["isa"] = isa_name(linear.isa());
  layout["panel_shape"] = linear.panel_shape();
  layout["group_size"] = linear.group_size();
  return layout;
}

PackedPtr packed_from_buffers(const py::dict& capsules, const std::string& dtype, int64_t in_features,
                              int64_t out_features, bool interleaved, const std::string& isa,
                              const std::array<int64_t, 3>& panel_shape, int64_t group_size) {
  require_shape_of_layer(dtype, in_features, out_features, interleaved);
  require_at_least("group_size", group_size, 0);
  using Tensors = std::vector<std::unique_ptr<TensorArgument>>;
  const auto tensors = std::make_shared<Tensors>();
  std::vector<PackedBuffer> buffers;
  for (const auto& [name, capsule] : capsules) {
    tensors->emplace_back(new TensorArgument(name.cast<std::string>(), capsule, {"float32", "bfloat16", "int8"}, 1));
    const TensorArgument& tensor = *tensors->back();
    const DType element = tensor.dtype() == "int8" ? DType::kInt8 : float_dtype(tensor);
    buffers.push_back({tensor.name(), element, tensor.data<void>(), tensor.size(0)});
  }
  const Arrangement arrangement = arrangement_of(interleaved);
  const DType type = dtype == "float32" ? DType::kFloat32 : DType::kBFloat16;
  auto linear = std::make_shared<PackedLinear>(type, in_features, out_features, arrangement, parse_isa("isa", isa),
                                               group_size, buffers, tensors);
  if (linear->panel_shape() != panel_shape) throw argument_error("panel_shape", "that of this build", "another");
  return linear;
}

void multiply_py(const PackedLinear& linear, py::handle input, py::handle output, int num_threads) {
  const char* dtype = dtype_name(linear);
  const TensorArgument x("input", input, {dtype}, 2);
  x.require_shape({x.size(0), linear.in_features()});
  const MatrixArgument y("output", output, "float32", x.size(0), linear.out_features(), Access::kWrite);
  require_at_least("num_threads", num_threads, 1);
  require_stacked(linear);
  const py::gil_scoped_release release;
  const int64_t element = size_of(linear.dtype());
  const AlignedBuffer padded(x.size(0) * linear.depth() * element);
  for (int64_t row = 0; row < x.size(0); ++row) {
    std::memcpy(static_cast<char*>(padded.data()) + row * linear.depth() * element,
                x.data<char>() + row * x.stride(0) * element, static_cast<size_t>(linear.in_features() * element));
  }
  linear.multiply(padded.data(), x.size(0), y.data<float>(), num_threads);
}

// --- PagedCache and ScoreHead ----------------------------------------------------------------------------------------

// The caller's tensors of a cache, kept alive.
class CacheTensors {
 public:
  CacheTensors(py::handle keys, py::handle values, py::handle block_table, py::handle hidden_states)
      : keys_("keys", keys, {"float32", "bfloat16"}, 5, Access::kWrite),
        values_("values", values, {keys_.dtype() == "float32" ? "float32" : "bfloat16"}, 5, Access::kWrite),
        block_table_("block_table", block_table, {"int32"}, 2),
        hidden_states_("hidden_states", hidden_states, {keys_.dtype() == "float32" ? "float32" : "bfloat16"}, 2,
                       Access::kWrite) {
    keys_.require_contiguous();
    values_.require_shape({keys_.size(0), keys_.size(1), keys_.size(2), keys_.size(3), keys_.size(4)});
    values_.require_contiguous();
    require_at_least("block_size of keys", keys_.size(3), 1);
    hidden_states_.require_shape({block_table_.size(0), hidden_states_.size(1)}).require_contiguous();
    view_ = {keys_.data<void>(),
             values_.data<void>(),
             keys_.size(1),
             keys_.size(3),
             block_table_.size(0),
             block_table_.size(1),
             block_table_.data<int32_t>(),
             block_table_.stride(0),
             hidden_states_.data<void>()};
  }

  const PagedCache& view() const { return view_; }

  // Throws std::invalid_argument unless the cache is one for `weights`.
  void check(const DecoderWeights& weights) const {
    const DecoderSpec& spec = weights.spec;
    const char* dtype = spec.dtype == DType::kFloat32 ? "float32" : "bfloat16";
    if (keys_.dtype() != dtype) throw argument_error("keys", dtype, keys_.dtype());
    const int64_t layers = static_cast<int64_t>(weights.layers.size());
    keys_.require_shape({layers, keys_.size(1), spec.num_kv_heads, keys_.size(3), spec.head_dim});
    hidden_states_.require_shape({block_table_.size(0), spec.hidden_size});
  }

 private:
  TensorArgument keys_, values_, block_table_, hidden_states_;
  PagedCache view_;
};

ScoreHead make_score_head(std::vector<int64_t> layers, int64_t hidden_size, int64_t mlp_size, py::handle dense_weight,
                          py::handle dense_bias, py::handle score_weight, float score_bias) {
  ScoreHead head;
  require_at_least("layers", static_cast<int64_t>(layers.size()), 1);
  require_at_least("mlp_size", mlp_size, 0);
  const int64_t features = hidden_size * static_cast<int64_t>(layers.size());
  if (mlp_size > 0) {
    head.dense_weight = float_vector("dense_weight", dense_weight, mlp_size * features);
    head.dense_bias = float_vector("dense_bias", dense_bias, mlp_size);
  }
  head.score_weight = float_vector("score_weight", score_weight, mlp_size > 0 ? mlp_size : features);
  head.score_bias = score_bias;
  head.layers = std::move(layers);
  return head;
}

// --- StepTensors -----------------------------------------------------------------------------------------------------

// Options and outputs of a batch's steps, named as in llm2_fast/reference.py. The caller reads and changes the tensors
// between steps.
class StepTensors {
 public:
  StepTensors(int64_t batch, int64_t max_candidates, int64_t pick_width, const py::kwargs& tensors)
      : batch_(batch), capsules_(tensors) {
    require_at_least("max_candidates", max_candidates, 1);
    SelectCandidatesArgs& select = step_.select;
    step_.size = batch;
    select.max_candidates = max_candidates;
    select.log_alpha = vector<float>("log_alpha", "float32");
    select.candidate_top_k = vector<int32_t>("candidate_top_k", "int32");
    select.ids = matrix<int32_t>("ids", "int32", max_candidates);
    select.candidate_logits = matrix<float>("candidate_logits", "float32", max_candidates);
    select.count = vector<int32_t>("count", "int32");
    select.logsumexp = vector<float>("logsumexp", "float32");
    select.cut = vector<bool>("cut", "bool");
    if (capsules_.contains("scores")) step_.scores = matrix<float>("scores", "float32", max_candidates);
    if (pick_width > 0) bind_pick(pick_width);
    capsules_ = py::dict();  // all are consumed
  }

  // A step's arguments over these tensors.
  StepBatch step(const Tokens& slots, const Tokens& lengths, const uint8_t* seen) const {
    StepBatch step = step_;
    step.slots = slots.data();
    step.lengths = lengths.data();
    step.seen = seen;
    return step;
  }

  int64_t batch() const { return batch_; }

 private:
  void bind_pick(int64_t pick_width) {
    AdjustAndPickArgs& pick = step_.pick;
    pick.max_candidates = pick_width;
    pick.beta = vector<float>("beta", "float32");
    pick.repetition_penalty = vector<float>("repetition_penalty", "float32");
    pick.temperature = vector<float>("temperature", "float32");
    pick.top_k = vector<int32_t>("top_k", "int32");
    pick.top_p = vector<float>("top_p", "float32");
    pick.log_min_p = vector<float>("log_min_p", "float32");
    pick.seed = vector<int64_t>("seed", "int64");
    pick.step = vector<int32_t>("step", "int32");
    pick.sample_index = vector<int32_t>("sample_index", "int32");
    pick.request_id = vector<int32_t>("request_id", "int32");
    pick.index = vector<int32_t>("index", "int32");
    pick.token = vector<int32_t>("token", "int32");
    pick.logprob = vector<float>("logprob", "float32");
    pick.system1_index = vector<int32_t>("system1_index", "int32");
    pick.adjusted = matrix<float>("adjusted", "float32", pick_width);
    pick.finished = vector<bool>("finished", "bool");
    tensors_.emplace_back(new TensorArgument("eos_token_ids", capsule("eos_token_ids"), {"int32"}, 2));
    tensors_.back()->require_shape({batch_, tensors_.back()->size(1)});
    pick.num_eos = tensors_.back()->size(1);
    pick.eos_token_ids = tensors_.back()->data<int32_t>();
    pick.eos_token_ids_row_stride = tensors_.back()->stride(0);
  }

  py::handle capsule(const char* name) const {
    if (!capsules_.contains(name)) throw argument_error(name, "a tensor", "none");
    return capsules_[name];
  }
  template <typename T>
  T* vector(const char* name, const char* dtype) {
    tensors_.emplace_back(new VectorArgument(name, capsule(name), dtype, batch_, Access::kWrite));
    return tensors_.back()->data<T>();
  }
  template <typename T>
  T* matrix(const char* name, const char* dtype, int64_t columns) {
    tensors_.emplace_back(new MatrixArgument(name, capsule(name), dtype, batch_, columns, Access::kWrite));
    return tensors_.back()->data<T>();
  }

  int64_t batch_;
  py::dict capsules_;
  std::vector<std::unique_ptr<TensorArgument>> tensors_;
  StepBatch step_ = {};
};

// --- Decoder ---------------------------------------------------------------------------------------------------------

class BoundDecoder {
 public:
  BoundDecoder(DecoderWeights weights, Isa isa, std::unique_ptr<TensorArgument> embedding)
      : embedding_(std::move(embedding)), decoder_(std::move(weights), isa) {}

  void forward(const CacheTensors& cache, const Tokens& token_ids, const Tokens& slots, const Tokens& positions,
               const Flags& stored, bool adapted, const ScoreHead* head, py::handle scores, int num_threads) {
    cache.check(decoder_.weights());
    DecoderRows rows = decoder_rows(token_ids, slots, positions, stored);
    rows.first_adapted = adapted ? 0 : rows.count;
    std::unique_ptr<VectorArgument> score_out;
    if (head != nullptr) score_out.reset(new VectorArgument("scores", scores, "float32", rows.count, Access::kWrite));
    const py::gil_scoped_release release;
    decoder_.forward(cache.view(), rows, head, head == nullptr ? nullptr : score_out->data<float>(), num_threads);
  }

  void keep_row(const CacheTensors& cache, int64_t row) {
    cache.check(decoder_.weights());
    const py::gil_scoped_release release;
    decoder_.keep_row(cache.view(), row);
  }

  void propose(const CacheTensors& cache, const StepTensors& tensors, const Tokens& slots, const Tokens& token_ids,
               const Tokens& token_slots, const Tokens& positions, int64_t vocab_size, int num_threads) {
    cache.check(decoder_.weights());
    const Flags stored(token_ids.size(), 1);
    const DecoderRows pending = decoder_rows(token_ids, token_slots, positions, stored);
    const StepBatch step = step_batch(tensors, slots, {}, nullptr, std::min(vocab_size, decoder_.spec().vocab_size));
    const py::gil_scoped_release release;
    decoder_.propose(cache.view(), pending, step, num_threads);
  }

  void plain_step(const CacheTensors& cache, const StepTensors& tensors, const Tokens& slots, const Tokens& token_ids,
                  const Tokens& token_slots, const Tokens& positions, py::handle seen, int num_threads) {
    cache.check(decoder_.weights());
    const Flags stored(token_ids.size(), 1);
    const DecoderRows pending = decoder_rows(token_ids, token_slots, positions, stored);
    const OptionalMatrixArgument seen_rows = seen_argument(tensors, seen);
    const StepBatch step = step_batch(tensors, slots, {}, seen_rows.data<uint8_t>(), decoder_.spec().vocab_size);
    const py::gil_scoped_release release;
    decoder_.plain_step(cache.view(), pending, step, num_threads);
  }

  void joint_step(const CacheTensors& cache, const StepTensors& tensors, const Tokens& slots, const Tokens& lengths,
                  const ScoreHead& head, const CacheTensors* adapted_cache, const Tokens& adapted_slots,
                  py::handle seen, int num_threads) {
    cache.check(decoder_.weights());
    require_equal("size of lengths", static_cast<int64_t>(lengths.size()), tensors.batch());
    const OptionalMatrixArgument seen_rows = seen_argument(tensors, seen);
    const StepBatch step = step_batch(tensors, slots, lengths, seen_rows.data<uint8_t>(), decoder_.spec().vocab_size);
    std::unique_ptr<AdaptedBranches> adapted;
    if (adapted_cache != nullptr) {
      adapted_cache->check(decoder_.weights());
      require_equal("size of adapted_slots", static_cast<int64_t>(adapted_slots.size()), tensors.batch());
      adapted.reset(new AdaptedBranches{adapted_cache->view(), adapted_slots.data()});
    }
    const py::gil_scoped_release release;
    decoder_.joint_step(cache.view(), head, adapted.get(), step, num_threads);
  }

 private:
  static DecoderRows decoder_rows(const Tokens& token_ids, const Tokens& slots, const Tokens& positions,
                                  const Flags& stored) {
    const int64_t count = static_cast<int64_t>(token_ids.size());
    require_equal("size of slots", static_cast<int64_t>(slots.size()), count);
    require_equal("size of positions", static_cast<int64_t>(positions.size()), count);
    require_equal("size of stored", static_cast<int64_t>(stored.size()), count);
    return {count, token_ids.data(), slots.data(), positions.data(), stored.data()};
  }

  static StepBatch step_batch(const StepTensors& tensors, const Tokens& slots, const Tokens& lengths,
                              const uint8_t* seen, int64_t vocab_size) {
    require_equal("size of slots", static_cast<int64_t>(slots.size()), tensors.batch());
    StepBatch step = tensors.step(slots, lengths, seen);
    step.select.vocab_size = vocab_size;
    return step;
  }

  OptionalMatrixArgument seen_argument(const StepTensors& tensors, py::handle seen) const {
    return OptionalMatrixArgument("seen", seen, "bool", tensors.batch(), decoder_.spec().vocab_size);
  }

  std::unique_ptr<TensorArgument> embedding_;
  CheckedDecoder decoder_;
};

DecoderSpec read_spec(const py::handle& spec) {
  const auto integer = [&](const char* name) {
    const int64_t value = spec.attr(name).cast<int64_t>();
    require_at_least(name, value, 1);
    return value;
  };
  DecoderSpec read;
  const std::string dtype = spec.attr("dtype").cast<std::string>();
  if (dtype != "float32" && dtype != "bfloat16") throw argument_error("dtype", "float32 or bfloat16", dtype);
  read.dtype = dtype == "float32" ? DType::kFloat32 : DType::kBFloat16;
  read.hidden_size = integer("hidden_size");
  read.intermediate_size = integer("intermediate_size");
  read.num_heads = integer("num_heads");
  read.num_kv_heads = integer("num_kv_heads");
  read.head_dim = integer("head_dim");
  read.vocab_size = integer("vocab_size");
  read.rms_norm_eps = spec.attr("rms_norm_eps").cast<float>();
  read.attention_scale = spec.attr("attention_scale").cast<float>();
  read.embedding_scale = spec.attr("embedding_scale").cast<float>();
  const std::string activation = spec.attr("activation").cast<std::string>();
  if (activation != "silu" && activation != "gelu_tanh") {
    throw argument_error("activation", "silu or gelu_tanh", activation);
  }
  read.activation = activation == "silu" ? Activation::kSilu : Activation::kGeluTanh;
  for (const py::handle table : spec.attr("rotary_tables")) {
    read.rotary_tables.push_back(
        {table.attr("inv_freq").cast<std::vector<float>>(), table.attr("scale").cast<float>()});
  }
  check_spec(read);
  return read;
}

void check_linear(const char* name, const PackedPtr& linear, int64_t in_features, int64_t out_features,
                  const DecoderSpec& spec, Isa isa) {
  const std::string prefix = std::string(" of ") + name;
  if (linear->dtype() != spec.dtype || linear->isa() != isa) {
    throw argument_error(name, "the dtype of the spec and the tier of the other layers", "another");
  }
  require_equal("in_features" + prefix, linear->in_features(), in_features);
  require_equal("out_features" + prefix, linear->out_features(), out_features);
}

AdaptedLinear read_linear(const char* name, const py::handle& layer, int64_t in_features, int64_t out_features,
                          const DecoderSpec& spec, Isa isa) {
  const py::object linear = layer.attr(name);
  const auto weight = linear.attr("weight").cast<PackedPtr>();
  check_linear(name, weight, in_features, out_features, spec, isa);
  const bool interleaved = std::strcmp(name, "gate_up") == 0;
  const auto check_arrangement = [&](const PackedPtr& packed, bool expected) {
    if ((packed->arrangement() == Arrangement::kInterleaved) != expected) {
      throw argument_error(name, expected ? "interleaved weights" : "stacked weights", "others");
    }
  };
  check_arrangement(weight, interleaved);
  if (linear.attr("lora_a").is_none()) return {weight, nullptr, nullptr};
  const auto lora_a = linear.attr("lora_a").cast<PackedPtr>(), lora_b = linear.attr("lora_b").cast<PackedPtr>();
  check_linear("lora_a", lora_a, in_features, lora_a->out_features(), spec, isa);
  check_linear("lora_b", lora_b, lora_a->out_features(), out_features, spec, isa);
  check_arrangement(lora_a, false);
  check_arrangement(lora_b, interleaved);
  return {weight, lora_a, lora_b};
}

DecoderLayer read_layer(const py::handle& layer, const DecoderSpec& spec, Isa isa) {
  const int64_t q_size = spec.num_heads * spec.head_dim, kv_size = spec.num_kv_heads * spec.head_dim;
  DecoderLayer read;
  read.input_norm = float_vector("input_norm", layer.attr("input_norm"), spec.hidden_size);
  read.mlp_input_norm = float_vector("mlp_input_norm", layer.attr("mlp_input_norm"), spec.hidden_size);
  const auto output_norm = [&](const char* name) { return optional_vector(name, layer.attr(name), spec.hidden_size); };
  read.attention_output_norm = output_norm("attention_output_norm");
  read.mlp_output_norm = output_norm("mlp_output_norm");
  read.q_norm = optional_vector("q_norm", layer.attr("q_norm"), spec.head_dim);
  read.k_norm = optional_vector("k_norm", layer.attr("k_norm"), spec.head_dim);
  read.qkv = read_linear("qkv", layer, spec.hidden_size, q_size + 2 * kv_size, spec, isa);
  read.o = read_linear("o", layer, q_size, spec.hidden_size, spec, isa);
  read.gate_up = read_linear("gate_up", layer, spec.hidden_size, 2 * spec.intermediate_size, spec, isa);
  read.down = read_linear("down", layer, spec.intermediate_size, spec.hidden_size, spec, isa);
  read.sliding_window = layer.attr("sliding_window").cast<int64_t>();
  require_at_least("sliding_window", read.sliding_window, 0);
  read.rotary_table = layer.attr("rotary_table").cast<int64_t>();
  require_index("rotary_table", read.rotary_table, static_cast<int64_t>(spec.rotary_tables.size()));
  return read;
}

std::unique_ptr<BoundDecoder> make_decoder(const py::handle& spec, const std::vector<py::object>& layers,
                                           py::handle final_norm, py::handle embedding, const PackedPtr& lm_head) {
  DecoderWeights weights;
  weights.spec = read_spec(spec);
  require_at_least("number of layers", static_cast<int64_t>(layers.size()), 1);
  const Isa isa = layers[0].attr("qkv").attr("weight").cast<PackedPtr>()->isa();
  for (const py::object& layer : layers) weights.layers.push_back(read_layer(layer, weights.spec, isa));
  weights.final_norm = float_vector("final_norm", final_norm, weights.spec.hidden_size);
  weights.lm_head = lm_head;
  if (lm_head) check_linear("lm_head", lm_head, weights.spec.hidden_size, weights.spec.vocab_size, weights.spec, isa);
  std::unique_ptr<TensorArgument> table;
  if (!embedding.is_none()) {
    const char* dtype = weights.spec.dtype == DType::kFloat32 ? "float32" : "bfloat16";
    table.reset(new TensorArgument("embedding", embedding, {dtype}, 2));
    table->require_shape({weights.spec.vocab_size, weights.spec.hidden_size}).require_contiguous();
  } else if (!lm_head) {
    throw argument_error("embedding", "a tensor, since there is no lm_head", "None");
  }
  weights.embedding = table ? table->data<void>() : nullptr;
  return std::make_unique<BoundDecoder>(std::move(weights), isa, std::move(table));
}

}  // namespace

void bind_decoder(py::module_& module) {
  using py::arg;
  py::class_<PackedLinear, PackedPtr>(module, "PackedLinear",
                                      "Linear layers with the same input, packed for one instruction-set tier.")
      .def(py::init(&make_packed_linear), arg("weights"), arg("biases"), arg("interleaved"), arg("num_threads"),
           arg("isa") = py::none(), arg("group_size") = 0)
      .def_static("from_buffers", &packed_from_buffers, arg("buffers"), arg("dtype"), arg("in_features"),
                  arg("out_features"), arg("interleaved"), arg("isa"), arg("panel_shape"), arg("group_size"),
                  "A layer over the buffers, DLPack capsules by name, and with the layout of a packed one. The weights "
                  "stay where they are.")
      .def_static("unpacked", &make_unpacked, arg("dtype"), arg("in_features"), arg("out_features"), arg("interleaved"),
                  arg("isa") = py::none(), arg("group_size") = 0,
                  "A layer of zeros without a bias, for pack_rows to fill.")
      .def("pack_rows", &pack_rows_py, arg("first"), arg("weights"), arg("num_threads"),
           "Packs rows from `first` on of the weight or, interleaved, of both. All but the last rows come in multiples "
           "of piece_rows.")
      .def_property_readonly("piece_rows", &PackedLinear::piece_rows)
      .def("buffers", &buffers_py,
           "DLPack capsules by name: weights, scales of int8 ones and, if there is one, bias. Not to be written to.")
      .def_property_readonly("layout", &layout_py, "The arguments of from_buffers besides the buffers.")
      .def_property_readonly("isa", [](const PackedLinear& linear) { return isa_name(linear.isa()); })
      .def_property_readonly("group_size", &PackedLinear::group_size)
      .def("unpack_row", &unpack_row_py, arg("row"), arg("output"),
           "output, float32 [in_features], = the weights of an output feature.")
      .def("multiply", &multiply_py, arg("input"), arg("output"), arg("num_threads"),
           "output, float32 [rows, out_features], = input [rows, in_features] times the weights, plus the biases.");
  py::class_<CacheTensors>(module, "PagedCache", "Keys, values, block table and final hidden states of all slots.")
      .def(py::init<py::handle, py::handle, py::handle, py::handle>(), arg("keys"), arg("values"), arg("block_table"),
           arg("hidden_states"));
  py::class_<ScoreHead>(module, "ScoreHead", "A verifier's scalar head.")
      .def(py::init(&make_score_head), arg("layers"), arg("hidden_size"), arg("mlp_size"), arg("dense_weight"),
           arg("dense_bias"), arg("score_weight"), arg("score_bias"));
  py::class_<StepTensors>(module, "StepTensors", "Options and outputs of a batch's steps.")
      .def(py::init<int64_t, int64_t, int64_t, const py::kwargs&>(), arg("batch"), arg("max_candidates"),
           arg("pick_width"));
  py::class_<BoundDecoder>(module, "Decoder",
                           "A decoder of the Llama or Gemma-3 family; see llm2_fast.backends.cpu for its use.")
      .def(py::init(&make_decoder), arg("spec"), arg("layers"), arg("final_norm"), arg("embedding"), arg("lm_head"))
      .def("forward", &BoundDecoder::forward, arg("cache"), arg("token_ids"), arg("slots"), arg("positions"),
           arg("stored"), arg("adapted"), arg("head"), arg("scores"), arg("num_threads"))
      .def("keep_row", &BoundDecoder::keep_row, arg("cache"), arg("row"))
      .def("propose", &BoundDecoder::propose, arg("cache"), arg("tensors"), arg("slots"), arg("token_ids"),
           arg("token_slots"), arg("positions"), arg("vocab_size"), arg("num_threads"))
      .def("plain_step", &BoundDecoder::plain_step, arg("cache"), arg("tensors"), arg("slots"), arg("token_ids"),
           arg("token_slots"), arg("positions"), arg("seen"), arg("num_threads"))
      .def("joint_step", &BoundDecoder::joint_step, arg("cache"), arg("tensors"), arg("slots"), arg("lengths"),
           arg("head"), arg("adapted_cache"), arg("adapted_slots"), arg("seen"), arg("num_threads"));
}

}  // namespace llm2_fast
