#include "llm2_fast/packed_linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <stdexcept>
#include <utility>

#include "kernels.h"
#include "large_pages.h"
#include "llm2_fast/thread_pool.h"

namespace llm2_fast {

// One output feature: its weights, or null for padding, and its bias.
struct PackedLinear::Feature {
  const void* weights;
  float bias;
};

namespace {

using Feature = PackedLinear::Feature;

constexpr int64_t kVectorAlignment = 64;

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

int64_t count_features(const std::vector<WeightView>& weights) {
  int64_t count = 0;
  for (const WeightView& view : weights) count += view.out_features;
  return count;
}

// Of whole panels.
int64_t padded_features(int64_t out_features, Arrangement arrangement, const PanelShape& panel) {
  return arrangement == Arrangement::kStacked ? round_up(out_features, panel.width)
                                              : 2 * round_up(out_features / 2, panel.lanes);
}

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

std::string describe(DType dtype, int64_t size) {
  const char* name = dtype == DType::kFloat32 ? " float32" : dtype == DType::kBFloat16 ? " bfloat16" : " int8";
  return std::to_string(size) + name + " elements";
}

// What the buffer `name` points at, null if there is none. Throws std::invalid_argument if it is of another type or
// size.
const void* find(const std::vector<PackedBuffer>& buffers, const char* name, DType dtype, int64_t size) {
  for (const PackedBuffer& buffer : buffers) {
    if (buffer.name != name) continue;
    if (buffer.dtype == dtype && buffer.size == size) return buffer.data;
    throw std::invalid_argument("buffers: expected " + buffer.name + " of " + describe(dtype, size) + ", got " +
                                describe(buffer.dtype, buffer.size));
  }
  return nullptr;
}

}  // namespace

AlignedBuffer::AlignedBuffer(int64_t bytes) {
  const int64_t size = round_up(bytes > 0 ? bytes : 1, kVectorAlignment);
  void* data = nullptr;
  if (posix_memalign(&data, kVectorAlignment, static_cast<size_t>(size)) != 0) throw std::bad_alloc();
  data_.reset(data);
  std::memset(data, 0, static_cast<size_t>(size));
}

PackedLinear::PackedLinear(DType dtype, const std::vector<WeightView>& weights, int64_t in_features,
                           Arrangement arrangement, Isa isa, int num_threads, int64_t group_size)
    : PackedLinear(dtype, in_features, count_features(weights), arrangement, isa, group_size) {
  const std::vector<Feature> features = arrange(weights, size_of(dtype), arrangement, kernels(isa).panel_shape(dtype));
  const bool has_bias =
      std::any_of(weights.begin(), weights.end(), [](const WeightView& view) { return view.bias != nullptr; });
  for (size_t i = 0; has_bias && i < features.size(); ++i) bias_.push_back(features[i].bias);
  pack(features, 0, num_threads);
}

PackedLinear::PackedLinear(DType dtype, int64_t in_features, int64_t out_features, Arrangement arrangement, Isa isa,
                           int64_t group_size)
    : dtype_(dtype), isa_(isa), arrangement_(arrangement), in_features_(in_features), out_features_(out_features) {
  const PanelShape panel = kernels(isa).panel_shape(dtype);
  const int64_t num_features = padded_features(out_features, arrangement, panel);
  depth_ = round_up(in_features, panel.depth);
  num_panels_ = num_features / panel.width;
  group_size_ = group_size < in_features ? group_size : depth_;
  const int64_t weight_size = group_size_ > 0 ? 1 : size_of(dtype);
  const std::shared_ptr<void> storage = allocate_in_large_pages(num_features * depth_ * weight_size);
  packed_ = storage;
  writable_ = storage.get();
  if (group_size_ > 0) scales_.resize(static_cast<size_t>(num_features * num_groups(depth_, group_size_)));
}

int64_t PackedLinear::piece_rows() const {
  const PanelShape panel = kernels(isa_).panel_shape(dtype_);
  return arrangement_ == Arrangement::kStacked ? panel.width : panel.lanes;
}

void PackedLinear::pack_rows(int64_t first, const std::vector<WeightView>& weights, int num_threads) {
  const PanelShape panel = kernels(isa_).panel_shape(dtype_);
  pack(arrange(weights, size_of(dtype_), arrangement_, panel), first / piece_rows(), num_threads);
}

// Packs features in the order of the panels, from a panel on.
void PackedLinear::pack(const std::vector<Feature>& features, int64_t first_panel, int num_threads) {
  const KernelTable& table = kernels(isa_);
  const int64_t width = table.panel_shape(dtype_).width, count = static_cast<int64_t>(features.size()) / width;
  const int64_t panel_scales = scales_.empty() ? 0 : width * num_groups(depth_, group_size_);
  std::vector<const void*> rows;
  for (const Feature& feature : features) rows.push_back(feature.weights);
  float* scales = scales_.empty() ? nullptr : scales_.data() + first_panel * panel_scales;
  char* packed = static_cast<char*>(writable_) + first_panel * panel_bytes();
  const PackArgs args = {dtype_, rows.data(), in_features_, depth_, packed, scales, group_size_};
  run_parallel(num_threads, 1,
               [&](Worker& worker) { worker.each(count, [&](RowRange panels) { table.pack_panels(args, panels); }); });
  if (std::any_of(scales, scales + count * panel_scales, [](float scale) { return std::isnan(scale); })) {
    throw std::invalid_argument("weights: expected finite numbers, got NaN or infinity");
  }
}

PackedPanels PackedLinear::panels() const {
  return {packed_.get(), depth_, scales_.empty() ? nullptr : scales_.data(), group_size_};
}

PackedLinear::PackedLinear(DType dtype, int64_t in_features, int64_t out_features, Arrangement arrangement, Isa isa,
                           int64_t group_size, const std::vector<PackedBuffer>& buffers,
                           std::shared_ptr<const void> owner)
    : dtype_(dtype),
      isa_(isa),
      arrangement_(arrangement),
      in_features_(in_features),
      out_features_(out_features),
      group_size_(group_size) {
  const PanelShape panel = kernels(isa).panel_shape(dtype);
  const int64_t num_features = padded_features(out_features, arrangement, panel);
  depth_ = round_up(in_features, panel.depth);
  num_panels_ = num_features / panel.width;
  const bool quantized = group_size > 0;
  const int64_t num_scales = quantized ? num_features * num_groups(depth_, group_size) : 0;
  const void* weights = find(buffers, "weights", quantized ? DType::kInt8 : dtype, num_features * depth_);
  const void* scales = quantized ? find(buffers, "scales", DType::kFloat32, num_scales) : nullptr;
  const void* bias = find(buffers, "bias", DType::kFloat32, num_features);
  const size_t known = 1 + (quantized ? 1 : 0) + (bias == nullptr ? 0 : 1);
  if (weights == nullptr || (quantized && scales == nullptr) || buffers.size() != known) {
    throw std::invalid_argument(std::string("buffers: expected weights") + (quantized ? ", scales" : "") +
                                " and perhaps bias, got " + std::to_string(buffers.size()) + " buffers");
  }
  if (reinterpret_cast<uintptr_t>(weights) % kVectorAlignment != 0) {
    throw std::invalid_argument("buffers: expected weights at a multiple of 64 bytes, got another address");
  }
  packed_ = std::shared_ptr<const void>(std::move(owner), weights);
  const auto copy = [](const void* data, int64_t size) {
    return std::vector<float>(static_cast<const float*>(data), static_cast<const float*>(data) + size);
  };
  if (scales != nullptr) scales_ = copy(scales, num_scales);
  if (bias != nullptr) bias_ = copy(bias, num_features);
}

int64_t PackedLinear::panel_bytes() const {
  return panel_shape()[0] * depth_ * (group_size_ > 0 ? 1 : size_of(dtype_));
}

std::array<int64_t, 3> PackedLinear::panel_shape() const {
  const PanelShape panel = kernels(isa_).panel_shape(dtype_);
  return {panel.width, panel.lanes, panel.depth};
}

std::vector<PackedBuffer> PackedLinear::buffers() const {
  const int64_t num_features = num_panels_ * panel_shape()[0];
  const DType type = group_size_ > 0 ? DType::kInt8 : dtype_;
  std::vector<PackedBuffer> buffers = {{"weights", type, packed_.get(), num_features * depth_}};
  if (!scales_.empty()) {
    buffers.push_back({"scales", DType::kFloat32, scales_.data(), static_cast<int64_t>(scales_.size())});
  }
  if (!bias_.empty()) buffers.push_back({"bias", DType::kFloat32, bias_.data(), num_features});
  return buffers;
}

void PackedLinear::unpack_row(int64_t row, float* output) const {
  kernels(isa_).unpack_row(dtype_, panels(), row, in_features_, output);
}

void PackedLinear::multiply(const void* input, int64_t rows, float* output, int num_threads) const {
  const KernelTable& table = kernels(isa_);
  const AlignedBuffer buffer(table.operands_size(dtype_, rows, depth_));
  LinearArgs args = {};
  args.dtype = dtype_;
  args.weights = {panels(), table.operands(dtype_, {input, depth_}, rows, depth_, buffer.data())};
  args.rows = rows;
  args.out_features = out_features_;
  args.bias = bias();
  args.epilogue = Epilogue::kStoreFloat;
  args.output = output;
  args.output_stride = out_features_;
  std::vector<AlignedBuffer> workspaces;
  for (int i = 0; i < num_threads; ++i) workspaces.emplace_back(table.linear_workspace(dtype_, panels(), rows));
  run_parallel(num_threads, 1, [&](Worker& worker) {
    LinearArgs mine = args;
    mine.workspace = workspaces[static_cast<size_t>(worker.index())].data();
    worker.each(num_panels_, [&](RowRange panels) { table.linear(mine, panels); });
  });
}

}  // namespace llm2_fast
