#include "llm2_fast/packed_linear.h"

#include <cmath>
#include <cstring>
#include <new>
#include <stdexcept>

#include "kernels.h"
#include "llm2_fast/thread_pool.h"
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace llm2_fast {
namespace {

constexpr int64_t kVectorAlignment = 64;
constexpr int64_t kHugePage = int64_t{2} << 20;

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// One output feature: its weights, or null for padding, and its bias.
struct Feature {
  const void* weights;
  float bias;
};

std::vector<Feature> features_of(const WeightView& view, int64_t element_size) {
  std::vector<Feature> features;
  for (int64_t i = 0; i < view.out_features; ++i) {
    const char* weights = static_cast<const char*>(view.weight) + i * view.row_stride * element_size;
    features.push_back({weights, view.bias == nullptr ? 0.0f : view.bias[i]});
  }
  return features;
}

// All output features in the order of the panels, padded to whole panels.
std::vector<Feature> arrange(const std::vector<WeightView>& weights, int64_t element_size, Arrangement arrangement,
                             const PanelShape& panel) {
  std::vector<Feature> arranged;
  if (arrangement == Arrangement::kStacked) {
    for (const WeightView& view : weights) {
      const std::vector<Feature> features = features_of(view, element_size);
      arranged.insert(arranged.end(), features.begin(), features.end());
    }
    arranged.resize(static_cast<size_t>(round_up(static_cast<int64_t>(arranged.size()), panel.width)));
    return arranged;
  }
  std::vector<std::vector<Feature>> sources;
  for (const WeightView& view : weights) {
    sources.push_back(features_of(view, element_size));
    sources.back().resize(static_cast<size_t>(round_up(view.out_features, panel.lanes)));
  }
  for (int64_t i = 0; i < static_cast<int64_t>(sources[0].size()); i += panel.lanes) {
    for (const std::vector<Feature>& source : sources) {
      arranged.insert(arranged.end(), source.begin() + i, source.begin() + i + panel.lanes);
    }
  }
  return arranged;
}

}  // namespace

AlignedBuffer::AlignedBuffer(int64_t bytes) {
  const int64_t alignment = bytes >= kHugePage ? kHugePage : kVectorAlignment;
  const size_t size = static_cast<size_t>(round_up(bytes > 0 ? bytes : 1, alignment));
  data_.reset(std::aligned_alloc(static_cast<size_t>(alignment), size));
  if (data_ == nullptr) throw std::bad_alloc();
#ifdef __linux__
  if (alignment == kHugePage) madvise(data_.get(), size, MADV_HUGEPAGE);  // advice only: failure changes nothing
#endif
  std::memset(data_.get(), 0, size);
}

PackedLinear::PackedLinear(DType dtype, const std::vector<WeightView>& weights, int64_t in_features,
                           Arrangement arrangement, Isa isa, int num_threads, int64_t group_size)
    : dtype_(dtype), isa_(isa), arrangement_(arrangement), in_features_(in_features) {
  const KernelTable& table = kernels(isa);
  const PanelShape panel = table.panel_shape(dtype);
  const int64_t element_size = size_of(dtype);
  const std::vector<Feature> features = arrange(weights, element_size, arrangement, panel);
  bool has_bias = false;
  out_features_ = 0;
  for (const WeightView& view : weights) {
    out_features_ += view.out_features;
    has_bias |= view.bias != nullptr;
  }
  depth_ = round_up(in_features, panel.depth);
  num_panels_ = static_cast<int64_t>(features.size()) / panel.width;
  group_size_ = group_size < in_features ? group_size : depth_;
  packed_ = AlignedBuffer(static_cast<int64_t>(features.size()) * depth_ * (group_size_ > 0 ? 1 : element_size));
  if (group_size_ > 0) scales_.resize(features.size() * static_cast<size_t>(num_groups(depth_, group_size_)));

  std::vector<const void*> rows;
  for (const Feature& feature : features) {
    rows.push_back(feature.weights);
    if (has_bias) bias_.push_back(feature.bias);
  }
  float* scales = scales_.empty() ? nullptr : scales_.data();
  const PackArgs args = {dtype, rows.data(), in_features, depth_, packed_.data(), scales, group_size_};
  run_parallel(num_threads, 1, [&](Worker& worker) {
    worker.each(num_panels_, [&](RowRange panels) { table.pack_panels(args, panels); });
  });
  for (float scale : scales_) {
    if (std::isnan(scale)) throw std::invalid_argument("weights: expected finite numbers, got NaN or infinity");
  }
}

PackedPanels PackedLinear::panels() const {
  return {packed_.data(), depth_, scales_.empty() ? nullptr : scales_.data(), group_size_};
}

void PackedLinear::unpack_row(int64_t row, float* output) const {
  kernels(isa_).unpack_row(dtype_, panels(), row, in_features_, output);
}

void PackedLinear::multiply(const void* input, int64_t rows, float* output, int num_threads) const {
  LinearArgs args = {};
  args.dtype = dtype_;
  args.weights = {panels(), input, depth_};
  args.rows = rows;
  args.out_features = out_features_;
  args.bias = bias();
  args.epilogue = Epilogue::kStoreFloat;
  args.output = output;
  args.output_stride = out_features_;
  const KernelTable& table = kernels(isa_);
  run_parallel(num_threads, 1,
               [&](Worker& worker) { worker.each(num_panels_, [&](RowRange panels) { table.linear(args, panels); }); });
}

}  // namespace llm2_fast
