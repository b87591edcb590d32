// What linear layers do with their sums, on every tier this machine can run: with weights of zero the sums are the
// bias. And that a row's sums are the same alone and among many, whose products are divided otherwise, and
// which rows an update is added to. Exits with 1 if a check fails.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "kernels.h"
#include "llm2_fast/isa.h"
#include "llm2_fast/packed_linear.h"

namespace {

using namespace llm2_fast;

constexpr int64_t kInFeatures = 4, kOutFeatures = 83, kRows = 14;  // neither whole panels nor whole tiles of rows
constexpr float kInf = std::numeric_limits<float>::infinity();

float of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Every kind of number that rounding and exponentials treat in their own way, in turn.
std::vector<float> biases(size_t offset) {
  const std::vector<float> kinds = {0.0f,
                                    -0.0f,
                                    1.0f,
                                    -1.0f,
                                    1.0f + 0x1p-8f,
                                    1.0f + 0x3p-8f,
                                    1.0f + 0x1.8p-8f,
                                    3.3895e38f,
                                    of_bits(0x7f800001u),
                                    kInf,
                                    -kInf,
                                    1e-40f,
                                    -1e-40f,
                                    of_bits(0xffc00000u),
                                    20.0f,
                                    -20.0f,
                                    100.0f,
                                    -100.0f,
                                    0.37f,
                                    -2.5f,
                                    1e30f,
                                    -1e30f,
                                    3.0f};
  std::vector<float> values;
  for (size_t i = 0; i < kOutFeatures; ++i) values.push_back(kinds[(i * 5 + offset) % kinds.size()]);
  return values;
}

// The output of a layer whose sums are `bias`, of one weight or of gate and up, for all rows.
template <typename T, typename Output>
std::vector<Output> run(const std::vector<std::vector<float>>& bias, Epilogue epilogue, Output before, Isa isa) {
  const DType dtype = sizeof(T) == 2 ? DType::kBFloat16 : DType::kFloat32;
  const std::vector<T> zeros(kOutFeatures * kInFeatures);
  std::vector<WeightView> weights;
  for (const std::vector<float>& values : bias)
    weights.push_back({zeros.data(), kOutFeatures, kInFeatures, values.data()});
  const Arrangement arrangement = is_gated(epilogue) ? Arrangement::kInterleaved : Arrangement::kStacked;
  const PackedLinear layer(dtype, weights, kInFeatures, arrangement, isa, 1);
  const std::vector<T> input(static_cast<size_t>(kRows * layer.depth()));
  std::vector<Output> output(static_cast<size_t>(kRows * kOutFeatures), before);
  LinearArgs args = {};
  args.dtype = dtype;
  const AlignedBuffer buffer(kernels(isa).operands_size(dtype, kRows, layer.depth()));
  args.weights = {layer.panels(),
                  kernels(isa).operands(dtype, {input.data(), layer.depth()}, kRows, layer.depth(), buffer.data())};
  args.rows = kRows;
  args.out_features = kOutFeatures;
  args.bias = layer.bias();
  args.epilogue = epilogue;
  args.output = output.data();
  args.output_stride = kOutFeatures;
  const AlignedBuffer workspace(kernels(isa).linear_workspace(dtype, layer.panels(), kRows));
  args.workspace = workspace.data();
  kernels(isa).linear(args, {0, layer.num_panels()});
  return output;
}

template <typename T>
bool same_bits(T a, T b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}

// Stored sums are those of from_float, to the bit; added ones those of a float addition.
template <typename T>
void test_stored(Isa isa) {
  current_case = std::string("stored sums, ") + isa_name(isa) + (sizeof(T) == 2 ? ", bfloat16" : ", float32");
  const std::vector<float> bias = biases(0);
  const std::vector<T> stored = run<T, T>({bias}, Epilogue::kStore, T{}, isa);
  const std::vector<float> floats = run<T, float>({bias}, Epilogue::kStoreFloat, 7.0f, isa);
  const std::vector<float> added = run<T, float>({bias}, Epilogue::kAdd, 0.25f, isa);
  for (size_t i = 0; i < stored.size(); ++i) {
    const float sum = 0.0f + bias[i % kOutFeatures];
    T expected;
    from_float(sum, &expected);
    CHECK(same_bits(stored[i], expected));
    CHECK(same_bits(floats[i], sum));
    CHECK(same_bits(added[i], 0.25f + sum) || (std::isnan(added[i]) && std::isnan(sum)));
  }
}

// gate * sigmoid(argument) * up in double, with the infinities and NaN of its float version.
double gated(Epilogue epilogue, double gate, double up) {
  const double argument =
      epilogue == Epilogue::kSiluMul ? gate : gate * (1.5957691216057308 + 0.07135481282990453 * gate * gate);
  const double e = std::exp(-std::abs(argument));
  return gate * (argument < 0.0 ? e : 1.0) / (1.0 + e) * up;
}

template <typename T>
void test_gated(Epilogue epilogue, Isa isa) {
  current_case = std::string(epilogue == Epilogue::kSiluMul ? "silu" : "gelu") + ", " + isa_name(isa) +
                 (sizeof(T) == 2 ? ", bfloat16" : ", float32");
  const double relative = sizeof(T) == 2 ? 5e-3 : 2e-6;
  for (size_t offset : {0, 1, 7}) {
    const std::vector<float> gate = biases(0), up = biases(offset);
    const std::vector<T> output = run<T, T>({gate, up}, epilogue, T{}, isa);
    for (size_t i = 0; i < output.size(); ++i) {
      const double expected = gated(epilogue, gate[i % kOutFeatures], up[i % kOutFeatures]);
      const double actual = to_float(output[i]);
      const bool overflows = std::abs(expected) > std::numeric_limits<float>::max();
      if (std::isnan(expected)) {
        CHECK(std::isnan(actual));
      } else if (overflows) {
        CHECK(actual == std::copysign(static_cast<double>(kInf), expected));
      } else {
        // exp() of less than -88 is zero, which leaves of 1e30 * e * up at most what is said here.
        CHECK(std::abs(actual - expected) <= 1e-30 + relative * std::abs(expected));
      }
    }
  }
}

// Different ones, between -2 and 2.
template <typename T>
std::vector<T> numbers(int64_t count, int factor) {
  std::vector<T> values(static_cast<size_t>(count));
  for (size_t i = 0; i < values.size(); ++i) {
    from_float(static_cast<float>(static_cast<int>(i * static_cast<size_t>(factor) % 255) - 127) / 64.0f, &values[i]);
  }
  return values;
}

// Many rows give the bits of each alone, and products are those of what is kept of the weights. With a group size of 0
// that is all of them.
template <typename T>
void test_many_rows(int64_t in_features, int64_t group_size, Isa isa) {
  current_case = std::to_string(in_features) + " inputs in groups of " + std::to_string(group_size) + ", " +
                 isa_name(isa) + (sizeof(T) == 2 ? ", bfloat16" : ", float32");
  constexpr int64_t kOut = 83, kMany = 41;
  const std::vector<T> weights = numbers<T>(kOut * in_features, 37);
  const DType dtype = sizeof(T) == 2 ? DType::kBFloat16 : DType::kFloat32;
  const PackedLinear layer(dtype, {{weights.data(), kOut, in_features, nullptr}}, in_features, Arrangement::kStacked,
                           isa, 1, group_size);
  const int64_t depth = layer.depth();
  std::vector<T> input = numbers<T>(kMany * depth, 101);
  for (int64_t row = 0; row < kMany; ++row) {
    for (int64_t k = in_features; k < depth; ++k) input[static_cast<size_t>(row * depth + k)] = T{};
  }
  std::vector<float> many(static_cast<size_t>(kMany * kOut)), one(static_cast<size_t>(kOut)),
      kept(static_cast<size_t>(in_features));
  layer.multiply(input.data(), kMany, many.data(), 2);
  for (int64_t row = 0; row < kMany; ++row) {
    layer.multiply(input.data() + row * depth, 1, one.data(), 1);
    for (int64_t feature = 0; feature < kOut; ++feature) {
      const float sum = many[static_cast<size_t>(row * kOut + feature)];
      CHECK(same_bits(sum, one[static_cast<size_t>(feature)]));
      layer.unpack_row(feature, kept.data());
      double expected = 0.0;
      for (int64_t k = 0; k < in_features; ++k) {
        expected += double{kept[static_cast<size_t>(k)]} * to_float(input[static_cast<size_t>(row * depth + k)]);
      }
      CHECK(std::abs(sum - expected) <= 1e-6 * static_cast<double>(in_features));  // of products up to 4
    }
  }
}

// The update is added to the finished sums of the rows that have one, and to no others.
template <typename T>
void test_updated_rows(int64_t in_features, int64_t first_updated, Isa isa) {
  current_case = std::to_string(in_features) + " inputs, updated from row " + std::to_string(first_updated) + " on, " +
                 isa_name(isa) + (sizeof(T) == 2 ? ", bfloat16" : ", float32");
  constexpr int64_t kOut = 83, kCount = 17, kRank = 6;
  const DType dtype = sizeof(T) == 2 ? DType::kBFloat16 : DType::kFloat32;
  const KernelTable& table = kernels(isa);
  const std::vector<T> weights = numbers<T>(kOut * in_features, 37), factors = numbers<T>(kOut * kRank, 11);
  const PackedLinear layer(dtype, {{weights.data(), kOut, in_features, nullptr}}, in_features, Arrangement::kStacked,
                           isa, 1);
  const PackedLinear b(dtype, {{factors.data(), kOut, kRank, nullptr}}, kRank, Arrangement::kStacked, isa, 1);
  const std::vector<T> input = numbers<T>(kCount * in_features, 101), low_rank = numbers<T>(kCount * kRank, 53);
  const AlignedBuffer inputs(table.operands_size(dtype, kCount, in_features));
  const AlignedBuffer updates(table.operands_size(dtype, kCount, kRank));
  std::vector<float> output(kCount * kOut), sums(kCount * kOut), added(kCount * kOut);
  LinearArgs args = {};
  args.dtype = dtype;
  args.weights = {layer.panels(),
                  table.operands(dtype, {input.data(), in_features}, kCount, in_features, inputs.data())};
  args.update = {b.panels(), table.operands(dtype, {low_rank.data(), kRank}, kCount, kRank, updates.data())};
  args.first_updated = first_updated;
  args.rows = kCount;
  args.out_features = args.output_stride = kOut;
  args.epilogue = Epilogue::kStoreFloat;
  args.output = output.data();
  const AlignedBuffer workspace(table.linear_workspace(dtype, layer.panels(), kCount));
  args.workspace = workspace.data();
  table.linear(args, {0, layer.num_panels()});
  layer.multiply(input.data(), kCount, sums.data(), 1);
  b.multiply(low_rank.data(), kCount, added.data(), 1);
  for (size_t i = 0; i < output.size(); ++i) {
    const bool updated = static_cast<int64_t>(i) >= first_updated * kOut;
    CHECK(same_bits(output[i], updated ? sums[i] + added[i] : sums[i]));
  }
}

}  // namespace

int main() {
  for (Isa isa : runnable_isas()) {
    test_stored<float>(isa);
    test_stored<BFloat16>(isa);
    for (Epilogue epilogue : {Epilogue::kSiluMul, Epilogue::kGeluTanhMul}) {
      test_gated<float>(epilogue, isa);
      test_gated<BFloat16>(epilogue, isa);
    }
    // Neither groups nor steps divide these; the second is more than is multiplied at once.
    for (int64_t in_features : {77, 1201}) {
      for (int64_t group_size : {int64_t{0}, int64_t{32}, int64_t{128}, in_features}) {
        test_many_rows<float>(in_features, group_size, isa);
        test_many_rows<BFloat16>(in_features, group_size, isa);
      }
    }
    for (int64_t in_features : {76, 1200}) {
      for (int64_t first_updated : {0, 7, 16, 17}) {
        test_updated_rows<float>(in_features, first_updated, isa);
        test_updated_rows<BFloat16>(in_features, first_updated, isa);
      }
    }
    std::printf("%s: done\n", isa_name(isa));
  }
  return report();
}
