// The thread pool, packed linear layers and the decoder without Python, on every tier this machine can run: against
// plain loops in double, and against themselves with other rows and threads. Exits with 1 if a check fails.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/cpu/kernels.h"
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
  for (int num_threads : {1, 2, 3, 2, 5, 3, 2, 5, 1}) {  // smaller jobs leave threads of the pool out
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

constexpr int64_t kPerFeature = std::numeric_limits<int64_t>::max();  // one group of any size

// What int8 keeps of the weights of one output feature.
template <typename T>
std::vector<float> kept(const T* weights, int64_t in_features, int64_t group_size) {
  std::vector<float> values;
  for (int64_t k = 0; k < in_features; ++k) values.push_back(to_float(weights[k]));
  for (int64_t begin = 0; group_size > 0 && begin < in_features;) {
    const int64_t end = begin + std::min(group_size, in_features - begin);
    float largest = 0.0f;
    for (int64_t k = begin; k < end; ++k) largest = std::max(largest, std::abs(values[static_cast<size_t>(k)]));
    const float scale = largest / 127.0f;
    for (int64_t k = begin; k < end; ++k) {
      float& value = values[static_cast<size_t>(k)];
      value = scale * std::nearbyint(value / scale);
    }
    begin = end;
  }
  return values;
}

template <typename T>
void test_packed_linear(Isa isa, int64_t group_size) {
  current_case = std::string("packed linear ") + isa_name(isa) + ", groups of " + std::to_string(group_size);
  for (const auto& [out_features, in_features] : std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {33, 7}, {70, 64}}) {
    const std::vector<T> weight = random_values<T>(out_features * in_features);
    const std::vector<float> bias = random_values<float>(out_features);
    const PackedLinear packed(dtype_of<T>(), {{weight.data(), out_features, in_features, bias.data()}}, in_features,
                              Arrangement::kStacked, isa, 2, group_size);
    std::vector<std::vector<float>> rows;
    for (int64_t n = 0; n < out_features; ++n) {
      rows.push_back(kept(weight.data() + n * in_features, in_features, group_size));
      std::vector<float> row(rows.back().size());
      packed.unpack_row(n, row.data());
      CHECK(row == rows.back());
    }

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
          expected += double{rows[static_cast<size_t>(n)][static_cast<size_t>(k)]} *
                      to_float(input[static_cast<size_t>(r * packed.depth() + k)]);
        }
        CHECK(std::abs(alone[static_cast<size_t>(n)] - expected) < 1e-5);
      }
    }
  }
}

void test_weights_that_are_not_finite(Isa isa) {
  current_case = std::string("weights that are not finite ") + isa_name(isa);
  for (float bad : {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
    const std::vector<float> weight = {1.0f, 2.0f, 3.0f, 4.0f, bad, 6.0f};
    bool refused = false;
    try {
      PackedLinear(DType::kFloat32, {{weight.data(), 2, 3, nullptr}}, 3, Arrangement::kStacked, isa, 2, 2);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    CHECK(refused);
  }
}

double activate(Epilogue activation, double x) {
  if (activation == Epilogue::kSiluMul) return x / (1.0 + std::exp(-x));
  return 0.5 * x * (1.0 + std::tanh(std::sqrt(2.0 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
}

// The gates are the weights of a layer with the input 1, the factors beside them 2.
void test_gates(Isa isa) {
  const std::vector<float> up(57, 2.0f), gate = [&] {
    std::vector<float> values = {0.0f, -0.0f, 1e-30f, -1e-30f, 89.0f, -89.0f, 1e20f, -1e20f};
    for (float x = -12.0f; values.size() < up.size(); x += 0.5f) values.push_back(x);
    return values;
  }();
  const int64_t size = static_cast<int64_t>(gate.size());
  const PackedLinear packed(DType::kFloat32, {{gate.data(), size, 1, nullptr}, {up.data(), size, 1, nullptr}}, 1,
                            Arrangement::kInterleaved, isa, 1);
  const std::vector<float> input(static_cast<size_t>(packed.depth()), 1.0f);
  for (Epilogue activation : {Epilogue::kSiluMul, Epilogue::kGeluTanhMul}) {
    current_case = std::string(activation == Epilogue::kSiluMul ? "silu " : "gelu_tanh ") + isa_name(isa);
    std::vector<float> output(gate.size());
    LinearArgs args = {};
    args.weights = {packed.panels(), {input.data(), packed.depth()}};
    args.rows = 1;
    args.out_features = args.output_stride = size;
    args.epilogue = activation;
    args.output = output.data();
    const AlignedBuffer workspace(kernels(isa).linear_workspace(args.dtype, packed.panels(), args.rows));
    args.workspace = workspace.data();
    kernels(isa).linear(args, {0, packed.num_panels()});
    for (size_t i = 0; i < gate.size(); ++i) {
      const double expected = 2.0 * activate(activation, gate[i]);
      CHECK(std::abs(output[i] - expected) <= 1e-6 * std::abs(expected) + 1e-12);
    }
  }
}

enum class Family { kLlama, kGemma3 };

std::string name_of(Family family) {
  return family == Family::kLlama ? "llama " : "gemma3 ";
}

// A small random decoder, with a low-rank update on its query, key and value layers, and a cache for it.
template <typename T>
class TinyDecoder {
 public:
  static constexpr int64_t kHidden = 20, kHeads = 3, kKvHeads = 1, kHeadDim = 6, kInner = 23, kVocab = 41, kRank = 3;
  static constexpr int64_t kLayers = 2, kSlots = 3, kBlocks = 240, kBlockSize = 4;

  // The layers have int8 weights if there is a group size, the update does not.
  TinyDecoder(Family family, Isa isa, int64_t group_size = 0)
      : keys_(static_cast<size_t>(kLayers * kBlocks * kKvHeads * kBlockSize * kHeadDim)),
        values_(keys_.size()),
        hidden_(static_cast<size_t>(kSlots * kHidden)) {
    // Slots get their blocks in an order that is not that of memory.
    for (int32_t i = 0; i < kBlocks; ++i) block_table_.push_back(i * 7 % static_cast<int32_t>(kBlocks));
    DecoderWeights weights;
    weights.spec = {dtype_of<T>(), kHidden, kInner, kHeads, kKvHeads,          kHeadDim,
                    kVocab,        1e-5f,   0.4f,   1.0f,   Activation::kSilu, {{{1.0f, 0.5f, 0.1f}, 1.0f}}};
    const bool gemma = family == Family::kGemma3;
    if (gemma) {
      weights.spec.embedding_scale = 4.5f;
      weights.spec.activation = Activation::kGeluTanh;
      weights.spec.rotary_tables.push_back({{0.3f, 0.2f, 0.1f}, 1.2f});
    }
    constexpr int64_t kQkv = (kHeads + 2 * kKvHeads) * kHeadDim;
    for (int64_t i = 0; i < kLayers; ++i) {
      DecoderLayer layer = {};
      layer.input_norm = layer.mlp_input_norm = random_values<float>(kHidden);
      if (gemma) layer.attention_output_norm = layer.mlp_output_norm = random_values<float>(kHidden);
      layer.q_norm = layer.k_norm = random_values<float>(kHeadDim);
      layer.qkv = {pack({kQkv}, kHidden, isa, group_size), pack({kRank}, kHidden, isa), pack({kQkv}, kRank, isa)};
      layer.o = {pack({kHidden}, kHeads * kHeadDim, isa, group_size), nullptr, nullptr};
      layer.gate_up = {pack({kInner, kInner}, kHidden, isa, group_size), nullptr, nullptr};
      layer.down = {pack({kHidden}, kInner, isa, group_size), nullptr, nullptr};
      layer.sliding_window = i == 0 ? 0 : 3;
      layer.rotary_table = gemma ? i : 0;
      weights.layers.push_back(std::move(layer));
    }
    weights.final_norm = random_values<float>(kHidden);
    weights.lm_head = pack({kVocab}, kHidden, isa, group_size);
    decoder_.reset(new Decoder(std::move(weights), isa));
  }

  PagedCache cache() {
    return {keys_.data(),     values_.data(),      kBlocks,          kBlockSize,    kSlots,
            kBlocks / kSlots, block_table_.data(), kBlocks / kSlots, hidden_.data()};
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
    return hidden_state(slot);
  }

  // After the last token of a slot.
  std::vector<T> hidden_state(int32_t slot) const {
    return {hidden_.begin() + slot * kHidden, hidden_.begin() + (slot + 1) * kHidden};
  }

 private:
  static std::shared_ptr<const PackedLinear> pack(const std::vector<int64_t>& out_features, int64_t in_features,
                                                  Isa isa, int64_t group_size = 0) {
    std::vector<std::vector<T>> weights;
    std::vector<WeightView> views;
    for (int64_t size : out_features) weights.push_back(random_values<T>(size * in_features));
    for (size_t i = 0; i < weights.size(); ++i) {
      views.push_back({weights[i].data(), out_features[i], in_features, nullptr});
    }
    const Arrangement arrangement = views.size() == 2 ? Arrangement::kInterleaved : Arrangement::kStacked;
    return std::make_shared<PackedLinear>(dtype_of<T>(), views, in_features, arrangement, isa, 1, group_size);
  }

  std::vector<T> keys_, values_, hidden_;
  std::vector<int32_t> block_table_;
  std::unique_ptr<Decoder> decoder_;
};

template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// Options and outputs of a selection of B rows, B being the size of `log_alpha`.
struct Selection {
  std::vector<float> log_alpha;
  std::vector<int32_t> top_k;
  int64_t max_candidates, vocab_size;
  std::vector<int32_t> ids, count;
  std::vector<float> logits, logsumexp;
  std::array<bool, 2> cut = {};

  Selection(int64_t max_candidates, std::vector<float> log_alpha, std::vector<int32_t> top_k, int64_t vocab_size)
      : log_alpha(std::move(log_alpha)),
        top_k(std::move(top_k)),
        max_candidates(max_candidates),
        vocab_size(vocab_size) {
    const size_t batch = this->log_alpha.size();
    ids.resize(batch * static_cast<size_t>(max_candidates));
    logits.resize(ids.size());
    count.resize(batch);
    logsumexp.resize(batch);
  }

  SelectCandidatesArgs args(const float* values) {
    SelectCandidatesArgs args = {};
    args.dtype = DType::kFloat32;
    args.vocab_size = vocab_size;
    args.max_candidates = max_candidates;
    args.logits = values;
    args.log_alpha = log_alpha.data();
    args.candidate_top_k = top_k.data();
    args.ids = ids.data();
    args.candidate_logits = logits.data();
    args.count = count.data();
    args.logsumexp = logsumexp.data();
    args.cut = cut.data();
    return args;
  }
};

// Selection beside the computation of the logits equals the op's on the logits, whoever computes them.
template <typename T>
void test_selection(TinyDecoder<T>& tiny, Isa isa) {
  constexpr int64_t kRows = 2, kCandidates = 3;
  const int32_t slots[kRows] = {0, 1};
  for (int num_threads : {1, 3}) {
    for (float log_alpha : {-std::numeric_limits<float>::infinity(), -0.1f, -10.0f}) {
      for (int32_t top_k : {0, 2, 3}) {
        for (int64_t vocab_size : {tiny.kVocab, tiny.kVocab - 9}) {
          Selection folded(kCandidates, {log_alpha, log_alpha}, {top_k, top_k}, vocab_size), direct = folded;
          std::vector<float> logits(static_cast<size_t>(kRows * tiny.kVocab));
          float* rows[kRows] = {logits.data(), logits.data() + tiny.kVocab};
          tiny.decoder().select(tiny.cache(), slots, kRows, folded.args(nullptr), rows, num_threads);
          CHECK(std::memcmp(rows[0], rows[1], static_cast<size_t>(tiny.kVocab) * sizeof(float)) == 0);
          SelectCandidatesArgs args = direct.args(logits.data());
          args.logits_row_stride = tiny.kVocab;
          select_candidates(args, {0, kRows}, isa);
          CHECK(folded.ids == direct.ids && folded.count == direct.count);
          CHECK(same_bits(folded.logits, direct.logits));
          CHECK(folded.cut[0] == direct.cut[0] && folded.cut[1] == direct.cut[1]);
          CHECK(std::abs(folded.logsumexp[0] - direct.logsumexp[0]) < 1e-5f);
        }
      }
    }
  }
}

// The logits of a row are written if they are wanted, and only they; the selection does not depend on it.
template <typename T>
void test_selection_without_logits(TinyDecoder<T>& tiny) {
  constexpr int64_t kRows = 2, kNobody = -1;
  constexpr float kUntouched = -7654321.0f;
  const int32_t slots[kRows] = {0, 2};  // of different tokens
  for (int num_threads : {1, 3}) {
    const auto select = [&](float* const* rows) {
      Selection selection(3, {-10.0f, -10.0f}, {0, 0}, tiny.kVocab);
      tiny.decoder().select(tiny.cache(), slots, kRows, selection.args(nullptr), rows, num_threads);
      return selection;
    };
    std::vector<float> logits(static_cast<size_t>(kRows * tiny.kVocab));
    float* const rows[kRows] = {logits.data(), logits.data() + tiny.kVocab};
    const Selection expected = select(rows);
    CHECK(std::memcmp(rows[0], rows[1], static_cast<size_t>(tiny.kVocab) * sizeof(float)) != 0);
    for (int64_t wanted : {kNobody, int64_t{0}, int64_t{1}}) {
      std::vector<float> written(logits.size(), kUntouched);
      float* wanted_rows[kRows] = {};
      if (wanted != kNobody) wanted_rows[wanted] = written.data() + wanted * tiny.kVocab;
      const Selection selection = select(wanted_rows);
      CHECK(selection.ids == expected.ids && selection.count == expected.count && selection.cut == expected.cut);
      CHECK(same_bits(selection.logits, expected.logits) && same_bits(selection.logsumexp, expected.logsumexp));
      for (int64_t i = 0; i < kRows * tiny.kVocab; ++i) {
        const size_t index = static_cast<size_t>(i);
        CHECK(written[index] == (i / tiny.kVocab == wanted ? logits[index] : kUntouched));
      }
    }
  }
}

// A token gives the same bits as part of a prompt, alone, and as a branch that is kept, with any number of threads.
template <typename T>
void test_decoder(Family family, Isa isa, int64_t group_size) {
  current_case = name_of(family) + "decoder " + isa_name(isa) + ", groups of " + std::to_string(group_size);
  TinyDecoder<T> tiny(family, isa, group_size);
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

  test_selection(tiny, isa);
  test_selection_without_logits(tiny);
}

// Rows with the low-rank updates beside rows without, each with a cache of their own, give what they give alone.
template <typename T>
void test_adapted_rows(Family family, Isa isa) {
  current_case = name_of(family) + "adapted rows " + isa_name(isa);
  TinyDecoder<T> tiny(family, isa);
  const std::vector<int32_t> tokens = {3, 14, 15, 9, 3, 14, 15, 9}, positions = {0, 1, 2, 3, 0, 1, 2, 3};
  const std::vector<uint8_t> stored(8, 1);
  std::vector<std::vector<T>> alone;
  for (int64_t first_adapted : {4, 0}) {
    const std::vector<int32_t> slots(4, first_adapted == 0 ? 1 : 0);
    tiny.decoder().forward(tiny.cache(),
                           {4, tokens.data(), slots.data(), positions.data(), stored.data(), first_adapted}, nullptr,
                           nullptr, 1);
    tiny.decoder().keep_row(tiny.cache(), 3);
    alone.push_back(tiny.hidden_state(slots[0]));
  }
  CHECK(!same_bits(alone[0], alone[1]));
  // One storage serves as both caches: the slots differ.
  const PagedCache cache = tiny.cache();
  const std::vector<int32_t> slots = {2, 2, 2, 2, 1, 1, 1, 1};
  const ScoreHead head = {{ScoreHead::kFinalLayer}, {}, {}, random_values<float>(tiny.kHidden), 0.5f};
  for (int num_threads : {1, 2}) {
    std::vector<float> scores(8, 99.0f);
    tiny.decoder().forward(cache, {8, tokens.data(), slots.data(), positions.data(), stored.data(), 4, &cache}, &head,
                           scores.data(), num_threads);
    CHECK(scores[0] == 99.0f && scores[3] == 99.0f && scores[4] != 99.0f && scores[7] != 99.0f);
    tiny.decoder().keep_row(cache, 3);
    tiny.decoder().keep_row(cache, 7);
    CHECK(same_bits(tiny.hidden_state(2), alone[0]));
    CHECK(same_bits(tiny.hidden_state(1), alone[1]));
  }
}

// A prefix that threads share in parts gives the bits of one that a thread reads alone.
template <typename T>
void test_long_prefix(Family family, Isa isa) {
  current_case = name_of(family) + "long prefix " + isa_name(isa);
  TinyDecoder<T> tiny(family, isa);
  std::vector<int32_t> tokens;
  for (int32_t i = 0; i < 300; ++i) tokens.push_back(i * 11 % static_cast<int32_t>(tiny.kVocab));
  const std::vector<T> expected = tiny.extend(0, tokens, 0, 1);
  CHECK(same_bits(tiny.extend(1, tokens, 0, 3), expected));
  for (int num_threads : {1, 2, 3}) CHECK(same_bits(tiny.extend(1, {tokens.back()}, 299, num_threads), expected));
}

}  // namespace

int main() {
  test_thread_pool();
  for (Isa isa : runnable_isas()) {
    for (int64_t group_size : {int64_t{0}, kPerFeature, int64_t{6}}) {
      test_packed_linear<float>(isa, group_size);
      test_packed_linear<BFloat16>(isa, group_size);
    }
    test_weights_that_are_not_finite(isa);
    test_gates(isa);
    for (Family family : {Family::kLlama, Family::kGemma3}) {
      for (int64_t group_size : {int64_t{0}, kPerFeature, int64_t{6}}) {
        test_decoder<float>(family, isa, group_size);
        test_decoder<BFloat16>(family, isa, group_size);
      }
      test_adapted_rows<float>(family, isa);
      test_adapted_rows<BFloat16>(family, isa);
      test_long_prefix<float>(family, isa);
      test_long_prefix<BFloat16>(family, isa);
    }
    std::printf("%s: done\n", isa_name(isa));
  }
  return report();
}
