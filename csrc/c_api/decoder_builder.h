// Collects the tensors of a Hugging Face checkpoint and makes a decoder of them.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "llm2_fast/decoder.h"

namespace llm2_fast {

// Weights of a decoder, and what their embedding table points at.
struct BuiltDecoder {
  DecoderWeights weights;
  std::unique_ptr<unsigned char[]> embedding;
};

class DecoderBuilder {
 public:
  using Shape = std::vector<int64_t>;

  // `sliding_windows` has an entry per layer. Throws std::invalid_argument.
  DecoderBuilder(DecoderSpec spec, std::vector<int64_t> sliding_windows, bool tie_word_embeddings);

  // Copies a contiguous tensor, rounded to the decoder's dtype. Throws std::invalid_argument and std::bad_alloc.
  void add(const std::string& name, DType dtype, const Shape& shape, const void* data);

  // Packs the tensors and frees each copy as soon as it is packed. Throws std::invalid_argument if tensors are missing,
  // and then nothing has changed; std::bad_alloc.
  BuiltDecoder finish(Isa isa, int num_threads);

 private:
  struct Expected {
    Shape shape;
    bool required;
    std::string model;  // a layer has an optional tensor if the first layer has this one
  };
  struct Tensor {
    std::unique_ptr<unsigned char[]> data;  // of the decoder's dtype
    int64_t size;
  };

  void expect_layer(int64_t index);
  bool has(const std::string& name) const { return tensors_.count(name) > 0; }
  void check_complete() const;
  Tensor take(const std::string& name);
  std::vector<float> take_vector(const std::string& name);
  DecoderLayer take_layer(int64_t index, Isa isa, int num_threads);
  std::shared_ptr<const PackedLinear> take_linear(const std::vector<std::string>& modules, Arrangement arrangement,
                                                  Isa isa, int num_threads);

  DecoderSpec spec_;
  std::vector<int64_t> sliding_windows_;
  bool tied_;
  bool finished_ = false;
  std::map<std::string, Expected> expected_;
  std::map<std::string, Tensor> tensors_;
};

}  // namespace llm2_fast
