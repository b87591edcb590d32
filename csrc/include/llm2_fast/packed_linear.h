// Weights of a linear layer, packed for the kernels of one instruction-set tier.
#pragma once

#include <array>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "llm2_fast/dtype.h"
#include "llm2_fast/isa.h"

namespace llm2_fast {

// Zeroed memory, aligned for vectors.
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  // Throws std::bad_alloc.
  explicit AlignedBuffer(int64_t bytes);
  void* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(void* data) const { std::free(data); }
  };
  std::unique_ptr<void, Free> data_;
};

struct PackedPanels;

// Weight [out_features, in_features] of a linear layer, and its bias [out_features] or null. Only read while packing.
struct WeightView {
  const void* weight;
  int64_t out_features;
  int64_t row_stride;
  const float* bias;
};

// One of the arrays that a packed layer consists of, by the name under which files keep it.
struct PackedBuffer {
  std::string name;
  DType dtype;
  const void* data;
  int64_t size;  // elements
};

enum class Arrangement {
  kStacked,      // the output features of all weights, one after another
  kInterleaved,  // of two weights of one shape, such that the kernels can combine the i-th features of both
};

// One or more linear layers with the same input, as one.
class PackedLinear {
 public:
  // Packs `weights` of `dtype`. With a group size they become int8: `group_size` inputs share a float32 scale per
  // output feature; the last group may be smaller. It must be even or at least in_features. Throws std::bad_alloc, and
  // std::invalid_argument if a weight that is to be int8 is not finite.
  PackedLinear(DType dtype, const std::vector<WeightView>& weights, int64_t in_features, Arrangement arrangement,
               Isa isa, int num_threads, int64_t group_size = 0);

  // To be packed piece by piece with `pack_rows`, without a bias: weights that are too large to be had at once. Until
  // then they are zero.
  PackedLinear(DType dtype, int64_t in_features, int64_t out_features, Arrangement arrangement, Isa isa,
               int64_t group_size = 0);

  // Packs rows of the weights from `first` on, a multiple of `piece_rows()`: of the one weight if stacked, of both if
  // interleaved. All pieces but the last have a multiple of `piece_rows()` rows. Throws as the constructor does.
  void pack_rows(int64_t first, const std::vector<WeightView>& weights, int num_threads);
  int64_t piece_rows() const;
  bool packed_here() const { return writable_ != nullptr; }

  // Over the buffers of a layer that was packed with the same arguments. `weights` stay where they are, for as long as
  // this layer has `owner`. Throws std::invalid_argument unless names, dtypes, sizes and alignment are right.
  PackedLinear(DType dtype, int64_t in_features, int64_t out_features, Arrangement arrangement, Isa isa,
               int64_t group_size, const std::vector<PackedBuffer>& buffers, std::shared_ptr<const void> owner);

  DType dtype() const { return dtype_; }  // of the input, and of weights that are not int8
  Isa isa() const { return isa_; }
  int64_t in_features() const { return in_features_; }
  int64_t out_features() const { return out_features_; }  // of all weights together
  int64_t depth() const { return depth_; }                // in_features, padded
  int64_t num_panels() const { return num_panels_; }
  int64_t panel_bytes() const;                 // of a panel's weights
  std::array<int64_t, 3> panel_shape() const;  // width, lanes and depth, see csrc/cpu/kernels.h
  Arrangement arrangement() const { return arrangement_; }
  int64_t group_size() const { return group_size_; }  // 0: not int8
  PackedPanels panels() const;
  const float* bias() const { return bias_.empty() ? nullptr : bias_.data(); }  // in the order of the panels

  // What the layer consists of besides the numbers above: `weights`, `scales` of int8 ones and, if there is one,
  // `bias`. They live as long as the layer.
  std::vector<PackedBuffer> buffers() const;

  // Weights [in_features] of an output feature, as float32. Only of stacked weights.
  void unpack_row(int64_t row, float* output) const;

  // output [rows, out_features], float32, of input [rows, depth] of the dtype with zeros in the padding. Only of
  // stacked weights.
  void multiply(const void* input, int64_t rows, float* output, int num_threads) const;

  struct Feature;

 private:
  void pack(const std::vector<Feature>& features, int64_t first_panel, int num_threads);

  DType dtype_;
  Isa isa_;
  Arrangement arrangement_;
  int64_t in_features_, out_features_, depth_, num_panels_, group_size_;
  std::shared_ptr<const void> packed_;  // [num_panels * width * depth]
  void* writable_ = nullptr;            // the same, if it was packed here
  std::vector<float> scales_, bias_;
};

}  // namespace llm2_fast
