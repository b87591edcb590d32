// The thread pool, packed linear layers and the decoder without Python, on every tier this machine can run: against
// plain loops in double, and against themselves with other rows and threads. Exits with 1 if a check fails.
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "llm2_fast/decoder.h"
#include "llm2_fast/step.h"
#include "llm2_fast/thread_pool.h"

namespace {

using namespace llm2_fast;

std::mt19937 engine(7);

template <typename T>
std::vector<T> random_values(int64_t count) {
  std::normal_distribution<float> normal(0.0f, 0.3f);
  std::vector<T> values(static_cast<size_t>(count));
  for (T& value : values) from_float(normal(engine), &value);
  return values;
}

template <typename T>
constexpr DType dtype_of() {
  return sizeof(T) == 4 ? DType::kFloat32 : DType::kBFloat16;
}

void test_thread_pool() {
  for (int num_threads : {1, 2, 3, 2, 5}) {
    current_case = "thread pool of " + std::to_string(num_threads);
    for (int64_t items : {0, 1, 7, 1000}) {
      // Each phase reads what another thread may have written in the one before.
      constexpr int64_t kPhases = 40;
      std::vector<int64_t> values[2];
      values[0].resize(static_cast<size_t>(items));
      values[1].resize(static_cast<size_t>(items));
      run_parallel(num_threads, kPhases, [&](Worker& worker) {
        for (int64_t phase = 0; phase < kPhases; ++phase) {
          const std::vector<int64_t>& from = values[phase % 2];
          std::vector<int64_t>& to = values[1 - phase % 2];
          worker.each(items, [&](RowRange range) {
            for (int64_t i = range.begin; i < range.end; ++i) {
              to[static_cast<size_t>(i)] = from[static_cast<size_t>(items - 1 - i)] + 1;
            }
          });
        }
      });
      for (int64_t value : values[0]) CHECK(value == kPhases);
    }
  }
}

template <typename T>
void test_packed_linear(Isa isa) {
  current_case = std::string("packed linear ") + isa_name(isa);
  for (const auto& [out_features, in_features] : std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {33, 7}, {70, 64}}) {
    const std::vector<T> weight = random_values<T>(out_features * in_features);
    const std::vector<float> bias = random_values<float>(out_features);
    const PackedLinear packed(dtype_of<T>(), {{weight.data(), out_features, in_features, bias.data()}}, in_features,
                              Arrangement::kStacked, isa, 2);
    std::vector<float> row(static_cast<size_t>(in_features));
    packed.unpack_row(out_features - 1, row.data());
    CHECK(row.back() == to_float(weight.back()));

    constexpr int64_t kRows = 30;
    std::vector<T> input(static_cast<size_t>(kRows * packed.depth()), T{});
    for (int64_t r = 0; r < kRows; ++r) {
      const std::vector<T> values = random_values<T>(in_features);
      std::copy(values.begin(), values.end(), input.begin() + r * packed.depth());
    }
    std::vector<float> output(static_cast<size_t>(kRows * out_features));
    packed.multiply(input.data(), kRows, output.data(), 3);
    for (int64_t r = 0; r < kRows; ++r) {
      std::vector<float> alone(static_cast<size_t>(out_features));
      packed.multiply(input.data() + r * packed.depth(), 1, alone.data(), 1);
      CHECK(std::memcmp(alone.data(), output.data() + r * out_features, alone.size() * sizeof(float)) == 0);
      for (int64_t n = 0; n < out_features; ++n) {
        double expected = bias[static_cast<size_t>(n)];
        for (int64_t k = 0; k < in_features; ++k) {
          expected += double{to_float(weight[static_cast<size_t>(n * in_features + k)])} *
                      to_float(input[static_cast<size_t>(r * packed.depth() + k)]);
        }
        CHECK(std::abs(alone[static_cast<size_t>(n)] - expected) < 1e-5);
      }
    }
  }
}

// A small random decoder, with a low-rank update on its query, key and value layers, and a cache for it.
template <typename T>
class TinyDecoder {
 public:
  static constexpr int64_t kHidden = 20, kHeads = 3, kKvHeads = 1, kHeadDim = 6, kInner = 23, kVocab = 41, kRank = 3;
  static constexpr int64_t kLayers = 2, kSlots = 3, kBlocks = 12, kBlockSize = 4;

  explicit TinyDecoder(Isa isa)
      : keys_(static_cast<size_t>(kLayers * kBlocks * kKvHeads * kBlockSize * kHeadDim)),
        values_(keys_.size()),
        hidden_(static_cast<size_t>(kSlots * kHidden)) {
    // Slots get their blocks in an order that is not that of memory.
    for (int32_t i = 0; i < kBlocks; ++i) block_table_.push_back(i * 5 % static_cast<int32_t>(kBlocks));
    DecoderWeights weights;
    weights.spec = {dtype_of<T>(),      kHidden, kInner, kHeads, kKvHeads, kHeadDim, kVocab, 1e-5f, 0.4f,
                    {1.0f, 0.5f, 0.1f}, 1.0f};
    constexpr int64_t kQkv = (kHeads + 2 * kKvHeads) * kHeadDim;
    for (int64_t i = 0; i < kLayers; ++i) {
      DecoderLayer layer = {};
      layer.input_norm = layer.post_attention_norm = random_values<float>(kHidden);
      layer.q_norm = layer.k_norm = random_values<float>(kHeadDim);
      layer.qkv = {pack({kQkv}, kHidden, isa), pack({kRank}, kHidden, isa), pack({kQkv}, kRank, isa)};
      layer.o = {pack({kHidden}, kHeads * kHeadDim, isa), nullptr, nullptr};
      layer.gate_up = {pack({kInner, kInner}, kHidden, isa), nullptr, nullptr};
      layer.down = {pack({kHidden}, kInner, isa), nullptr, nullptr};
      layer.sliding_window = i == 0 ? 0 : 3;
      weights.layers.push_back(std::move(layer));
    }
    weights.final_norm = random_values<float>(kHidden);
    weights.lm_head = pack({kVocab}, kHidden, isa);
    decoder_.reset(new Decoder(std::move(weights), isa));
  }

  PagedCache cache() {
    return {keys_.data(), values_.data(), kBlocks, kBlockSize, block_table_.data(), kBlocks / kSlots, hidden_.data()};
  }
  Decoder& decoder() { return *decoder_; }

  // Runs `tokens` as a chain behind `position` and returns the hidden state after the last one.
  std::vector<T> extend(int32_t slot, const std::vector<int32_t>& tokens, int32_t position, int num_threads) {
    std::vector<int32_t> slots(tokens.size(), slot), positions(tokens.size());
    std::iota(positions.begin(), positions.end(), position);
    const std::vector<uint8_t> stored(tokens.size(), 1);
    const PagedCache view = cache();
    const int64_t count = static_cast<int64_t>(tokens.size());
    decoder_->forward(view, {count, tokens.data(), slots.data(), positions.data(), stored.data()}, nullptr, nullptr,
                      num_threads);
    decoder_->keep_row(view, count - 1);
    return {hidden_.begin() + slot * kHidden, hidden_.begin() + (slot + 1) * kHidden};
  }

 private:
  static std::shared_ptr<const PackedLinear> pack(const std::vector<int64_t>& out_features, int64_t in_features,
                                                  Isa isa) {
    std::vector<std::vector<T>> weights;
    std::vector<WeightView> views;
    for (int64_t size : out_features) weights.push_back(random_values<T>(size * in_features));
    for (size_t i = 0; i < weights.size(); ++i) {
      views.push_back({weights[i].data(), out_features[i], in_features, nullptr});
    }
    const Arrangement arrangement = views.size() == 2 ? Arrangement::kInterleaved : Arrangement::kStacked;
    return std::make_shared<PackedLinear>(dtype_of<T>(), views, in_features, arrangement, isa, 1);
  }

  std::vector<T> keys_, values_, hidden_;
  std::vector<int32_t> block_table_;
  std::unique_ptr<Decoder> decoder_;
};

template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// A token gives the same bits as part of a prompt, alone, and as a branch that is kept, with any number of threads.
template <typename T>
void test_decoder(Isa isa) {
  current_case = std::string("decoder ") + isa_name(isa);
  TinyDecoder<T> tiny(isa);
  const std::vector<int32_t> tokens = {3, 14, 15, 9, 26, 5, 35, 8, 40};
  const std::vector<T> expected = tiny.extend(0, tokens, 0, 1);
  CHECK(std::isfinite(to_float(expected[0])) && to_float(expected[0]) != 0.0f);
  CHECK(same_bits(tiny.extend(1, tokens, 0, 3), expected));
  for (size_t i = 0; i < tokens.size(); ++i) {
    const std::vector<T> state = tiny.extend(2, {tokens[i]}, static_cast<int32_t>(i), 2);
    if (i + 1 == tokens.size()) CHECK(same_bits(state, expected));
  }

  const std::vector<T> next = tiny.extend(0, {7, 30}, 9, 2);
  const std::vector<int32_t> branches = {2, 7, 11}, slots = {1, 1, 1}, positions = {9, 9, 9};
  const std::vector<uint8_t> stored = {0, 0, 0};
  const ScoreHead head = {{0, ScoreHead::kFinalLayer}, {}, {}, random_values<float>(2 * tiny.kHidden), 0.5f};
  std::vector<float> scores(3);
  tiny.decoder().forward(tiny.cache(), {3, branches.data(), slots.data(), positions.data(), stored.data()}, &head,
                         scores.data(), 3);
  tiny.decoder().keep_row(tiny.cache(), 1);
  CHECK(std::isfinite(scores[1]) && scores[0] != scores[1]);
  CHECK(same_bits(tiny.extend(1, {30}, 10, 1), next));

  const int32_t both[] = {0, 1};
  const float* logits = tiny.decoder().logits(tiny.cache(), both, 2, 2);
  CHECK(std::memcmp(logits, logits + tiny.kVocab, static_cast<size_t>(tiny.kVocab) * sizeof(float)) == 0);
}

}  // namespace

int main() {
  test_thread_pool();
  for (Isa isa : runnable_isas()) {
    test_packed_linear<float>(isa);
    test_packed_linear<BFloat16>(isa);
    test_decoder<float>(isa);
    test_decoder<BFloat16>(isa);
    std::printf("%s: done\n", isa_name(isa));
  }
  return report();
}
