#include "llm2_fast/packed_linear.h"

#include <cstring>
#include <new>
#include <stdexcept>
#include <utility>

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

std::string describe(DType dtype, int64_t size) {
  return std::to_string(size) + (dtype == DType::kFloat32 ? " float32" : " bfloat16") + " elements";
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
  const int64_t alignment = size >= kHugePage ? kHugePage : kVectorAlignment;
  if (posix_memalign(&data, static_cast<size_t>(alignment), static_cast<size_t>(size)) != 0) throw std::bad_alloc();
  data_.reset(data);
#ifdef __linux__
  // Whole pages only: the rest of the last one would be memory that nobody uses. Advice: failure changes nothing.
  if (alignment == kHugePage) madvise(data, static_cast<size_t>(size / kHugePage * kHugePage), MADV_HUGEPAGE);
#endif
  std::memset(data, 0, static_cast<size_t>(size));
}

PackedLinear::PackedLinear(DType dtype, const std::vector<WeightView>& weights, int64_t in_features,
                           Arrangement arrangement, Isa isa, int num_threads)
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
  const auto storage = std::make_shared<AlignedBuffer>(static_cast<int64_t>(features.size()) * depth_ * element_size);
  packed_ = std::shared_ptr<const void>(storage, storage->data());

  std::vector<const void*> rows;
  for (const Feature& feature : features) {
    rows.push_back(feature.weights);
    if (has_bias) bias_.push_back(feature.bias);
  }
  const PackArgs args = {dtype, rows.data(), in_features, depth_, storage->data()};
  run_parallel(num_threads, 1, [&](Worker& worker) {
    worker.each(num_panels_, [&](RowRange panels) { table.pack_panels(args, panels); });
  });
}

PackedLinear::PackedLinear(DType dtype, int64_t in_features, int64_t out_features, Arrangement arrangement, Isa isa,
                           const std::vector<PackedBuffer>& buffers, std::shared_ptr<const void> owner)
    : dtype_(dtype), isa_(isa), arrangement_(arrangement), in_features_(in_features), out_features_(out_features) {
  const PanelShape panel = kernels(isa).panel_shape(dtype);
  const bool stacked = arrangement == Arrangement::kStacked;
  const int64_t num_features =
      stacked ? round_up(out_features, panel.width) : 2 * round_up(out_features / 2, panel.lanes);
  depth_ = round_up(in_features, panel.depth);
  num_panels_ = num_features / panel.width;
  const void* weights = find(buffers, "weights", dtype, num_features * depth_);
  const void* bias = find(buffers, "bias", DType::kFloat32, num_features);
  if (weights == nullptr || buffers.size() != (bias == nullptr ? 1 : 2)) {
    throw std::invalid_argument("buffers: expected weights and perhaps bias, got " + std::to_string(buffers.size()) +
                                " buffers, others among them");
  }
  if (reinterpret_cast<uintptr_t>(weights) % kVectorAlignment != 0) {
    throw std::invalid_argument("buffers: expected weights at a multiple of 64 bytes, got another address");
  }
  packed_ = std::shared_ptr<const void>(std::move(owner), weights);
  if (bias != nullptr) bias_.assign(static_cast<const float*>(bias), static_cast<const float*>(bias) + num_features);
}

std::array<int64_t, 3> PackedLinear::panel_shape() const {
  const PanelShape panel = kernels(isa_).panel_shape(dtype_);
  return {panel.width, panel.lanes, panel.depth};
}

std::vector<PackedBuffer> PackedLinear::buffers() const {
  const int64_t num_features = num_panels_ * panel_shape()[0];
  std::vector<PackedBuffer> buffers = {{"weights", dtype_, packed_.get(), num_features * depth_}};
  if (!bias_.empty()) buffers.push_back({"bias", DType::kFloat32, bias_.data(), num_features});
  return buffers;
}

void PackedLinear::unpack_row(int64_t row, float* output) const {
  kernels(isa_).unpack_row(dtype_, packed_.get(), row, depth_, in_features_, output);
}

void PackedLinear::multiply(const void* input, int64_t rows, float* output, int num_threads) const {
  LinearArgs args = {};
  args.dtype = dtype_;
  args.weights = {packed_.get(), depth_, input, depth_};
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
