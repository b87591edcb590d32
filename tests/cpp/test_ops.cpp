// The CPU kernels without Python, on every tier this machine can run: against plain loops in double, and against
// themselves in other row ranges. Exits with 1 if a check fails.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "llm2_fast/isa.h"
#include "llm2_fast/ops.h"
#include "llm2_fast/philox.h"

namespace {

using namespace llm2_fast;

constexpr float kInf = std::numeric_limits<float>::infinity();
const float kNan = std::nanf("");

// Exactly as many elements as asked for, on the heap: the address sanitizer sees every access outside of them.
template <typename T>
std::unique_ptr<T[]> exact_copy(const std::vector<T>& values) {
  std::unique_ptr<T[]> copy(new T[values.size()]);
  std::copy(values.begin(), values.end(), copy.get());
  return copy;
}

template <typename T>
std::vector<T> random_values(size_t count, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal(0.0f, 1.0f);
  std::vector<T> values(count);
  for (T& value : values) from_float(normal(engine), &value);
  return values;
}

template <typename T>
constexpr DType dtype_of();
template <>
constexpr DType dtype_of<float>() {
  return DType::kFloat32;
}
template <>
constexpr DType dtype_of<BFloat16>() {
  return DType::kBFloat16;
}

// --- philox and conversions ------------------------------------------------------------------------------------------

void test_philox() {
  current_case = "philox";
  const PhiloxCounter zeros = philox({{0, 0, 0, 0}}, 0);
  CHECK(zeros.words[0] == 0x6627e8d5u && zeros.words[1] == 0xe169c58du);
  CHECK(zeros.words[2] == 0xbc57ac4cu && zeros.words[3] == 0x9b00dbd8u);
  const PhiloxCounter ones = philox({{~0u, ~0u, ~0u, ~0u}}, ~uint64_t{0});
  CHECK(ones.words[0] == 0x408f276du && ones.words[1] == 0x41c83b0eu);
  CHECK(ones.words[2] == 0xa20bc7c6u && ones.words[3] == 0x6d5451fdu);

  CHECK(uniform_from_word(0) > 0.0f && uniform_from_word(~0u) < 1.0f);
  CHECK(std::isfinite(gumbel_from_word(0)));
  CHECK(gumbel_from_word(~0u) < kGumbelBound && gumbel_from_word(~0u) > 16.6f);
}

void test_bfloat16() {
  current_case = "bfloat16";
  const auto round_trip = [](float value) {
    BFloat16 stored;
    from_float(value, &stored);
    return to_float(stored);
  };
  CHECK(round_trip(1.0f) == 1.0f);
  CHECK(round_trip(1.0f + 0x1p-8f) == 1.0f);              // a tie, to even
  CHECK(round_trip(1.0f + 0x3p-8f) == 1.0f + 0x1p-6f);    // a tie, to even
  CHECK(round_trip(1.0f + 0x1.8p-8f) == 1.0f + 0x1p-7f);  // above a tie
  CHECK(round_trip(-kInf) == -kInf);
  CHECK(std::isnan(round_trip(kNan)));
  float almost_infinite_nan;
  const uint32_t bits = 0x7f800001u;  // rounding alone would make it infinite
  std::memcpy(&almost_infinite_nan, &bits, sizeof(bits));
  CHECK(std::isnan(round_trip(almost_infinite_nan)));
}

void test_isa() {
  current_case = "isa";
  CHECK(!runnable_isas().empty() && runnable_isas().front() == Isa::kPortable);
  for (Isa isa : runnable_isas()) CHECK(parse_isa("isa", isa_name(isa)) == isa);
  bool refused = false;
  try {
    parse_isa("isa", "sse9");
  } catch (const std::invalid_argument& error) {
    refused = std::strstr(error.what(), "isa: expected") != nullptr && std::strstr(error.what(), "'sse9'") != nullptr;
  }
  CHECK(refused);
}

// --- select_candidates -----------------------------------------------------------------------------------------------

template <typename T>
void check_selection(const std::vector<T>& row, int64_t max_candidates, float log_alpha, int32_t top_k, Isa isa) {
  const auto logits = exact_copy(row);
  std::vector<int32_t> ids(static_cast<size_t>(max_candidates));
  std::vector<float> candidate_logits(ids.size());
  int32_t count = -7;
  float logsumexp = 0;
  bool cut = false;
  SelectCandidatesArgs args = {};
  args.vocab_size = static_cast<int64_t>(row.size());
  args.max_candidates = max_candidates;
  args.dtype = dtype_of<T>();
  args.logits = logits.get();
  args.log_alpha = &log_alpha;
  args.candidate_top_k = &top_k;
  args.ids = ids.data();
  args.candidate_logits = candidate_logits.data();
  args.count = &count;
  args.logsumexp = &logsumexp;
  args.cut = &cut;
  select_candidates(args, {0, 1}, isa);

  float max = -kInf;
  bool usable = true;
  for (const T& value : row) {
    usable = usable && !std::isnan(to_float(value));
    max = std::max(max, to_float(value));
  }
  usable = usable && std::isfinite(max);
  std::vector<int32_t> order;
  double sum = 0;
  for (size_t i = 0; i < row.size(); ++i) {
    const float z = to_float(row[i]);
    sum += std::exp(static_cast<double>(z) - static_cast<double>(max));
    if (usable && z >= max + log_alpha && z > -kInf) order.push_back(static_cast<int32_t>(i));
  }
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return to_float(row[static_cast<size_t>(a)]) > to_float(row[static_cast<size_t>(b)]);
  });
  if (top_k > 0 && order.size() > static_cast<size_t>(top_k)) order.resize(static_cast<size_t>(top_k));
  CHECK(cut == (order.size() > ids.size()));
  order.resize(std::min(order.size(), ids.size()));
  CHECK(count == static_cast<int32_t>(order.size()));
  for (size_t i = 0; i < ids.size(); ++i) {
    CHECK(ids[i] == (i < order.size() ? order[i] : -1));
    CHECK(candidate_logits[i] == (i < order.size() ? to_float(row[static_cast<size_t>(order[i])]) : -kInf));
  }
  const double expected = static_cast<double>(max) + std::log(sum);
  CHECK(usable ? std::abs(logsumexp - expected) <= 2e-6 + 1e-6 * std::abs(expected) : std::isnan(logsumexp));
}

template <typename T>
void test_select_candidates(Isa isa) {
  for (size_t vocab : {1, 2, 15, 16, 17, 63, 1000, 1024, 1025, 5000, 300000}) {
    current_case = std::string("select_candidates ") + isa_name(isa) + " V=" + std::to_string(vocab);
    std::vector<T> row = random_values<T>(vocab, static_cast<unsigned>(vocab));
    for (int64_t max_candidates : {1, 5, 40}) {
      check_selection(row, max_candidates, std::log(0.1f), 0, isa);
      check_selection(row, max_candidates, -kInf, 3, isa);
    }
    for (float special : {-kInf, kInf, kNan}) {
      std::vector<T> changed = row;
      from_float(special, &changed[vocab / 2]);
      check_selection(changed, 7, -1.0f, 0, isa);
    }
    std::vector<T> equal(vocab);
    for (T& value : equal) from_float(1.5f, &value);
    check_selection(equal, 9, 0.0f, 0, isa);
    for (T& value : equal) from_float(-kInf, &value);
    check_selection(equal, 9, 0.0f, 0, isa);
    from_float(kNan, &equal.back());  // NaN among nothing but -inf
    check_selection(equal, 9, 0.0f, 0, isa);
  }
}

// --- adjust_and_pick -------------------------------------------------------------------------------------------------

struct PickCase {
  std::vector<float> logits;
  std::vector<float> scores;
  float beta = 0.5f, temperature = 0.0f, top_p = 1.0f, log_min_p = -kInf;
  int32_t count = 0, top_k = 0;
  int64_t seed = 42;
};

struct PickResult {
  int32_t index = -7, token = -7, system1_index = -7;
  float logprob = 0;
  bool finished = false;
  std::vector<float> adjusted;
};

PickResult run_pick(const PickCase& c, Isa isa) {
  std::vector<int32_t> id_values(c.logits.size());
  for (size_t i = 0; i < id_values.size(); ++i) id_values[i] = static_cast<int32_t>(3 * (id_values.size() - i));
  const auto ids = exact_copy(id_values);
  const auto logits = exact_copy(c.logits);
  const auto scores = exact_copy(c.scores);
  const float penalty = 1.0f;
  const int32_t zero = 0, eos = id_values.front();
  PickResult result;
  result.adjusted.resize(c.logits.size());
  AdjustAndPickArgs args = {};
  args.max_candidates = static_cast<int64_t>(c.logits.size());
  args.num_eos = 1;
  args.candidate_ids = ids.get();
  args.candidate_logits = logits.get();
  args.count = &c.count;
  args.scores = c.scores.empty() ? nullptr : scores.get();
  args.beta = &c.beta;
  args.repetition_penalty = &penalty;
  args.temperature = &c.temperature;
  args.top_k = &c.top_k;
  args.top_p = &c.top_p;
  args.log_min_p = &c.log_min_p;
  args.seed = &c.seed;
  args.step = args.sample_index = args.request_id = &zero;
  args.eos_token_ids = &eos;
  args.index = &result.index;
  args.token = &result.token;
  args.logprob = &result.logprob;
  args.system1_index = &result.system1_index;
  args.adjusted = result.adjusted.data();
  args.finished = &result.finished;
  adjust_and_pick(args, {0, 1}, isa);
  return result;
}

void test_greedy_pick(Isa isa) {
  current_case = std::string("greedy pick ") + isa_name(isa);
  PickCase c;
  c.logits = {5, 4, 3, 100};
  c.scores = {-4, 0, 4, 1};
  c.count = 3;
  PickResult r = run_pick(c, isa);
  CHECK(r.adjusted[0] == 3 && r.adjusted[1] == 4 && r.adjusted[2] == 5 && r.adjusted[3] == -kInf);
  CHECK(r.index == 2 && r.token == 6 && r.system1_index == 0 && !r.finished);
  CHECK(std::abs(r.logprob + std::log(1 + std::exp(-1.0) + std::exp(-2.0))) < 1e-6);

  c.scores = {-2, 0, 2, 1};  // all equal: the lowest id is the last inside the count
  CHECK(run_pick(c, isa).index == 2);
  c.scores = {0, kNan, 0, 0};
  r = run_pick(c, isa);
  CHECK(r.index == -1 && r.token == -1 && r.system1_index == -1 && std::isnan(r.logprob) && !r.finished);
  c.scores = {0, 0, kInf, 0};
  CHECK(run_pick(c, isa).index == -1);
  c.scores = {kNan, kNan, kNan, kNan};
  c.count = 1;  // a single candidate needs no score
  r = run_pick(c, isa);
  CHECK(r.index == 0 && r.finished && r.logprob == 0.0f && r.adjusted[0] == 5);
  c.count = 0;
  CHECK(run_pick(c, isa).index == -1);
  c.count = -3;
  CHECK(run_pick(c, isa).index == -1);
  c.count = 99;  // more than there are: all
  c.scores.clear();
  CHECK(run_pick(c, isa).index == 3);
}

// Among all tokens, which sampled token would plain loops pick?
int32_t naive_sample(const PickCase& c) {
  std::vector<size_t> order(c.logits.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  const size_t n = order.size();
  const auto id = [&](size_t i) { return static_cast<uint32_t>(3 * (n - i)); };
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return c.logits[a] > c.logits[b] || (c.logits[a] == c.logits[b] && id(a) < id(b));
  });
  if (c.top_k > 0) order.resize(std::min(order.size(), static_cast<size_t>(c.top_k)));
  size_t best = order[0];
  float best_value = -kInf;
  for (size_t i : order) {
    const float value = c.logits[i] / c.temperature +
                        gumbel_from_word(philox({{id(i), 0, 0, 0}}, static_cast<uint64_t>(c.seed)).words[0]);
    if (value > best_value) {
      best = i;
      best_value = value;
    }
  }
  return static_cast<int32_t>(best);
}

void test_sampled_pick(Isa isa) {
  for (size_t size : {1, 3, 16, 33, 4000}) {
    for (int64_t seed = 0; seed < 20; ++seed) {
      current_case = std::string("sampled pick ") + isa_name(isa) + " K=" + std::to_string(size);
      PickCase c;
      c.logits = random_values<float>(size, static_cast<unsigned>(seed));
      c.count = static_cast<int32_t>(size);
      c.temperature = 1.0f;  // a division by it is exact on both sides
      c.seed = seed - 7;     // negative keys too
      CHECK(run_pick(c, isa).index == naive_sample(c));
      c.top_k = 5;
      CHECK(run_pick(c, isa).index == naive_sample(c));
      c.top_p = 1e-6f;  // leaves the largest only
      PickCase greedy = c;
      greedy.temperature = 0.0f;
      CHECK(run_pick(c, isa).index == run_pick(greedy, isa).index);
      c.top_p = 1.0f;
      c.log_min_p = 0.0f;
      CHECK(run_pick(c, isa).index == run_pick(greedy, isa).index);
    }
  }
}

// --- branch_attention ------------------------------------------------------------------------------------------------

struct AttentionCase {
  int64_t num_heads, num_kv_heads, head_dim, block_size, sliding_window;
};

struct AttentionRow {
  int32_t sequence, prefix_length;
  uint8_t has_own;
};

template <typename T>
class AttentionTest {
 public:
  AttentionTest(const AttentionCase& c, const std::vector<AttentionRow>& rows) : c_(c), rows_(rows) {
    const size_t heads = static_cast<size_t>(c.num_kv_heads * c.head_dim);
    queries_ = exact_copy(random_values<T>(rows.size() * static_cast<size_t>(c.num_heads * c.head_dim), 1));
    keys_ = exact_copy(random_values<T>(kBlocks * static_cast<size_t>(c.block_size) * heads, 2));
    values_ = exact_copy(random_values<T>(kBlocks * static_cast<size_t>(c.block_size) * heads, 3));
    own_keys_ = exact_copy(random_values<T>(rows.size() * heads, 4));
    own_values_ = exact_copy(random_values<T>(rows.size() * heads, 5));
    for (const AttentionRow& row : rows) {
      sequences_.push_back(row.sequence);
      lengths_.push_back(row.prefix_length);
      has_own_.push_back(row.has_own);
    }
    // Two sequences; the blocks of each are scattered.
    for (int32_t i = 0; i < 2 * kBlocksPerSequence; ++i) table_.push_back((7 * i + 3) % kBlocks);
  }

  // Output of the rows [begin, end), the others zero.
  std::vector<T> run(RowRange range, Isa isa) {
    std::vector<T> output(rows_.size() * static_cast<size_t>(c_.num_heads * c_.head_dim));
    BranchAttentionArgs args = {};
    args.num_heads = c_.num_heads;
    args.num_kv_heads = c_.num_kv_heads;
    args.head_dim = c_.head_dim;
    args.block_size = c_.block_size;
    args.dtype = dtype_of<T>();
    args.query = queries_.get();
    args.query_row_stride = c_.num_heads * c_.head_dim;
    args.query_head_stride = c_.head_dim;
    args.key_cache = keys_.get();
    args.value_cache = values_.get();
    args.key_block_stride = args.value_block_stride = c_.num_kv_heads * c_.block_size * c_.head_dim;
    args.key_head_stride = args.value_head_stride = c_.block_size * c_.head_dim;
    args.key_position_stride = args.value_position_stride = c_.head_dim;
    args.block_table = table_.data();
    args.block_table_row_stride = kBlocksPerSequence;
    args.row_sequence = sequences_.data();
    args.row_prefix_length = lengths_.data();
    args.row_has_own = has_own_.data();
    args.own_key = own_keys_.get();
    args.own_value = own_values_.get();
    args.own_key_row_stride = args.own_value_row_stride = c_.num_kv_heads * c_.head_dim;
    args.own_key_head_stride = args.own_value_head_stride = c_.head_dim;
    args.scale = scale();
    args.sliding_window = c_.sliding_window;
    args.output = output.data();
    branch_attention(args, range, isa);
    return output;
  }

  // Output element by plain loops in double.
  double expected(int64_t row, int64_t head, int64_t d) const {
    const AttentionRow& r = rows_[static_cast<size_t>(row)];
    const int64_t kv_head = head / (c_.num_heads / c_.num_kv_heads);
    const int64_t position = r.has_own ? r.prefix_length : r.prefix_length - 1;
    double max = -kInf, sum = 0, weighted = 0;
    for (int pass = 0; pass < 2; ++pass) {
      for (int64_t t = 0; t < r.prefix_length + r.has_own; ++t) {
        if (c_.sliding_window > 0 && t <= position - c_.sliding_window) continue;
        double score = 0;
        for (int64_t i = 0; i < c_.head_dim; ++i) {
          score += static_cast<double>(
                       to_float(queries_[static_cast<size_t>((row * c_.num_heads + head) * c_.head_dim + i)])) *
                   static_cast<double>(at(keys_, own_keys_, row, kv_head, t, i));
        }
        score *= static_cast<double>(scale());
        if (pass == 0) {
          max = std::max(max, score);
        } else {
          const double weight = std::exp(score - max);
          sum += weight;
          weighted += weight * static_cast<double>(at(values_, own_values_, row, kv_head, t, d));
        }
      }
    }
    return sum > 0 ? weighted / sum : 0;
  }

 private:
  static constexpr int32_t kBlocksPerSequence = 60, kBlocks = 2 * kBlocksPerSequence + 1;

  float scale() const { return 1.0f / std::sqrt(static_cast<float>(c_.head_dim)); }

  float at(const std::unique_ptr<T[]>& cache, const std::unique_ptr<T[]>& own, int64_t row, int64_t kv_head, int64_t t,
           int64_t d) const {
    const AttentionRow& r = rows_[static_cast<size_t>(row)];
    if (t == r.prefix_length)
      return to_float(own[static_cast<size_t>((row * c_.num_kv_heads + kv_head) * c_.head_dim + d)]);
    const int64_t block = table_[static_cast<size_t>(r.sequence * kBlocksPerSequence + t / c_.block_size)];
    const int64_t position = (block * c_.num_kv_heads + kv_head) * c_.block_size + t % c_.block_size;
    return to_float(cache[static_cast<size_t>(position * c_.head_dim + d)]);
  }

  AttentionCase c_;
  std::vector<AttentionRow> rows_;
  std::unique_ptr<T[]> queries_, keys_, values_, own_keys_, own_values_;
  std::vector<int32_t> table_, sequences_, lengths_;
  std::vector<uint8_t> has_own_;
};

template <typename T>
void test_branch_attention(Isa isa) {
  const std::vector<AttentionRow> rows = {{0, 130, 1}, {0, 130, 1}, {0, 70, 0}, {1, 0, 1},
                                          {1, 0, 0},   {1, 64, 1},  {0, 5, 1},  {0, 179, 1}};
  // heads, key/value heads, head_dim, block size, window
  for (const AttentionCase& c : std::vector<AttentionCase>{{9, 3, 64, 16, 0},
                                                           {4, 4, 5, 3, 0},
                                                           {7, 1, 33, 5, 20},
                                                           {2, 1, 80, 64, 1},
                                                           {5, 1, 128, 100, 70},
                                                           {1, 1, 1, 3, 0}}) {
    current_case = std::string("branch_attention ") + isa_name(isa) + " head_dim=" + std::to_string(c.head_dim);
    AttentionTest<T> test(c, rows);
    const int64_t num_rows = static_cast<int64_t>(rows.size()), size = c.num_heads * c.head_dim;
    const std::vector<T> output = test.run({0, num_rows}, isa);
    const double relative = sizeof(T) == 4 ? 1e-5 : 0.005;
    for (int64_t row = 0; row < num_rows; ++row) {
      for (int64_t i = 0; i < size; ++i) {
        const double expected = test.expected(row, i / c.head_dim, i % c.head_dim);
        const double actual = to_float(output[static_cast<size_t>(row * size + i)]);
        CHECK(std::abs(actual - expected) <= 1e-5 + relative * std::abs(expected));
      }
      const std::vector<T> alone = test.run({row, row + 1}, isa);
      CHECK(std::memcmp(&alone[static_cast<size_t>(row * size)], &output[static_cast<size_t>(row * size)],
                        static_cast<size_t>(size) * sizeof(T)) == 0);
    }
  }
}

}  // namespace

int main() {
  test_philox();
  test_bfloat16();
  test_isa();
  for (Isa isa : runnable_isas()) {
    test_select_candidates<float>(isa);
    test_select_candidates<BFloat16>(isa);
    test_greedy_pick(isa);
    test_sampled_pick(isa);
    test_branch_attention<float>(isa);
    test_branch_attention<BFloat16>(isa);
    std::printf("%s: done\n", isa_name(isa));
  }
  return report();
}
