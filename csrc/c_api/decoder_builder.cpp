#include "decoder_builder.h"

#include <cstring>
#include <utility>

#include "llm2_fast/checks.h"

namespace llm2_fast {
namespace {

std::string layer_prefix(int64_t index) {
  return "model.layers." + std::to_string(index) + ".";
}

std::string text(const DecoderBuilder::Shape& shape) {
  std::string sizes;
  for (int64_t size : shape) sizes += (sizes.empty() ? "" : ", ") + std::to_string(size);
  return "shape [" + sizes + "]";
}

template <typename From, typename To>
void convert(const void* from, int64_t size, void* to) {
  for (int64_t i = 0; i < size; ++i) from_float(to_float(static_cast<const From*>(from)[i]), static_cast<To*>(to) + i);
}

void convert(const void* from, DType from_dtype, int64_t size, void* to, DType to_dtype) {
  if (from_dtype == to_dtype) {
    std::memcpy(to, from, static_cast<size_t>(size * size_of(to_dtype)));
  } else if (to_dtype == DType::kFloat32) {
    convert<BFloat16, float>(from, size, to);
  } else {
    convert<float, BFloat16>(from, size, to);
  }
}

}  // namespace

DecoderBuilder::DecoderBuilder(DecoderSpec spec, std::vector<int64_t> sliding_windows, bool tie_word_embeddings)
    : spec_(std::move(spec)), sliding_windows_(std::move(sliding_windows)), tied_(tie_word_embeddings) {
  check_spec(spec_);
  const int64_t num_layers = static_cast<int64_t>(sliding_windows_.size());
  require_at_least("num_layers", num_layers, 1);
  for (int64_t window : sliding_windows_) require_at_least("sliding_windows", window, 0);

  expected_["model.embed_tokens.weight"] = {{spec_.vocab_size, spec_.hidden_size}, true, ""};
  for (int64_t layer = 0; layer < num_layers; ++layer) expect_layer(layer);
  expected_["model.norm.weight"] = {{spec_.hidden_size}, true, ""};
  if (!tied_) expected_["lm_head.weight"] = {{spec_.vocab_size, spec_.hidden_size}, false, "lm_head.weight"};
}

void DecoderBuilder::expect_layer(int64_t index) {
  const int64_t hidden = spec_.hidden_size, inner = spec_.intermediate_size;
  const int64_t q_size = spec_.num_heads * spec_.head_dim, kv_size = spec_.num_kv_heads * spec_.head_dim;
  const auto required = [&](const std::string& name, Shape shape) {
    expected_[layer_prefix(index) + name] = {std::move(shape), true, ""};
  };
  const auto optional = [&](const std::string& name, Shape shape) {
    expected_[layer_prefix(index) + name] = {std::move(shape), false, layer_prefix(0) + name};
  };
  const auto linear = [&](const std::string& module, int64_t out_features, int64_t in_features) {
    required(module + ".weight", {out_features, in_features});
    optional(module + ".bias", {out_features});
  };
  required("input_layernorm.weight", {hidden});
  linear("self_attn.q_proj", q_size, hidden);
  linear("self_attn.k_proj", kv_size, hidden);
  linear("self_attn.v_proj", kv_size, hidden);
  optional("self_attn.q_norm.weight", {spec_.head_dim});
  optional("self_attn.k_norm.weight", {spec_.head_dim});
  linear("self_attn.o_proj", hidden, q_size);
  required("post_attention_layernorm.weight", {hidden});
  linear("mlp.gate_proj", inner, hidden);
  linear("mlp.up_proj", inner, hidden);
  linear("mlp.down_proj", hidden, inner);
}

void DecoderBuilder::add(const std::string& name, DType dtype, const Shape& shape, const void* data) {
  if (finished_) throw argument_error("builder", "one that has made no decoder yet", "another");
  const auto expected = expected_.find(name);
  if (expected == expected_.end()) throw argument_error("name", "a tensor of this decoder", "'" + name + "'");
  if (shape != expected->second.shape) throw argument_error(name, text(expected->second.shape), text(shape));
  if (has(name)) throw argument_error("name", "a tensor that was not added yet", "'" + name + "'");
  int64_t size = 1;
  for (int64_t extent : shape) size *= extent;
  Tensor tensor = {
      std::unique_ptr<unsigned char[]>(new unsigned char[static_cast<size_t>(size * size_of(spec_.dtype))]), size};
  convert(data, dtype, size, tensor.data.get(), spec_.dtype);
  tensors_.emplace(name, std::move(tensor));
}

BuiltDecoder DecoderBuilder::finish(Isa isa, int num_threads) {
  if (finished_) throw argument_error("builder", "one that has made no decoder yet", "another");
  check_complete();
  finished_ = true;
  BuiltDecoder built;
  built.weights.spec = spec_;
  for (int64_t layer = 0; layer < static_cast<int64_t>(sliding_windows_.size()); ++layer) {
    built.weights.layers.push_back(take_layer(layer, isa, num_threads));
  }
  built.weights.final_norm = take_vector("model.norm.weight");
  if (tied_ || has("lm_head.weight")) {
    const char* module = tied_ ? "model.embed_tokens" : "lm_head";
    built.weights.lm_head = take_linear({module}, Arrangement::kStacked, isa, num_threads);
  }
  if (!tied_) built.embedding = take("model.embed_tokens.weight").data;
  built.weights.embedding = built.embedding.get();
  return built;
}

void DecoderBuilder::check_complete() const {
  for (const auto& [name, expected] : expected_) {
    if (!has(name) && (expected.required || has(expected.model))) throw argument_error(name, "a tensor", "none");
    if (has(name) && !expected.required && !has(expected.model)) {
      throw argument_error(name, "none, since there is no " + expected.model, "a tensor");
    }
  }
}

DecoderLayer DecoderBuilder::take_layer(int64_t index, Isa isa, int num_threads) {
  const std::string prefix = layer_prefix(index);
  const auto linear = [&](const std::vector<std::string>& modules, Arrangement arrangement = Arrangement::kStacked) {
    std::vector<std::string> paths;
    for (const std::string& module : modules) paths.push_back(prefix + module);
    return AdaptedLinear{take_linear(paths, arrangement, isa, num_threads), nullptr, nullptr};
  };
  DecoderLayer layer = {};
  layer.input_norm = take_vector(prefix + "input_layernorm.weight");
  layer.mlp_input_norm = take_vector(prefix + "post_attention_layernorm.weight");
  layer.q_norm = take_vector(prefix + "self_attn.q_norm.weight");
  layer.k_norm = take_vector(prefix + "self_attn.k_norm.weight");
  layer.qkv = linear({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"});
  layer.o = linear({"self_attn.o_proj"});
  layer.gate_up = linear({"mlp.gate_proj", "mlp.up_proj"}, Arrangement::kInterleaved);
  layer.down = linear({"mlp.down_proj"});
  layer.sliding_window = sliding_windows_[static_cast<size_t>(index)];
  return layer;
}

// The weights and biases of `modules`, which have the same input, as one linear layer.
std::shared_ptr<const PackedLinear> DecoderBuilder::take_linear(const std::vector<std::string>& modules,
                                                                Arrangement arrangement, Isa isa, int num_threads) {
  const int64_t in_features = expected_.at(modules[0] + ".weight").shape[1];
  std::vector<Tensor> weights;
  std::vector<std::vector<float>> biases;
  for (const std::string& module : modules) {
    weights.push_back(take(module + ".weight"));
    biases.push_back(take_vector(module + ".bias"));
  }
  std::vector<WeightView> views;
  for (size_t i = 0; i < modules.size(); ++i) {
    const float* bias = biases[i].empty() ? nullptr : biases[i].data();
    views.push_back({weights[i].data.get(), weights[i].size / in_features, in_features, bias});
  }
  return std::make_shared<PackedLinear>(spec_.dtype, views, in_features, arrangement, isa, num_threads);
}

DecoderBuilder::Tensor DecoderBuilder::take(const std::string& name) {
  const auto found = tensors_.find(name);
  Tensor tensor = std::move(found->second);
  tensors_.erase(found);
  return tensor;
}

// As float32; empty if there is no such tensor.
std::vector<float> DecoderBuilder::take_vector(const std::string& name) {
  if (!has(name)) return {};
  const Tensor tensor = take(name);
  std::vector<float> values(static_cast<size_t>(tensor.size));
  convert(tensor.data.get(), spec_.dtype, tensor.size, values.data(), DType::kFloat32);
  return values;
}

}  // namespace llm2_fast
