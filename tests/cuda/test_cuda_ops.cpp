// The ops on the GPU against those on the CPU, through the C API: awkward sizes, ties, infinities and NaN, every
// option. Runs on a GPU, or on the emulator beside this file. Exits with 1 if a check fails, with 77 if there is no
// GPU.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../cpp/check.h"
#include "llm2_fast/dtype.h"
#include "llm2_fast/llm2_fast.h"

namespace {

using llm2_fast::BFloat16;
using llm2_fast::from_float;
using llm2_fast::to_float;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::mt19937 engine(3);

void check_cuda(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("CUDA: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

void check_status(llm2_fast_status status) {
  if (status != LLM2_FAST_OK) std::printf("%s: %s\n", current_case.c_str(), llm2_fast_last_error());
  CHECK(status == LLM2_FAST_OK);
}

void check_refused(llm2_fast_status status, const std::string& message) {
  if (message != llm2_fast_last_error()) std::printf("got: %s\n", llm2_fast_last_error());
  CHECK(status == LLM2_FAST_INVALID_ARGUMENT && message == llm2_fast_last_error());
}

// An array on the device of exactly its size.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(const std::vector<T>& values) : size_(values.size()) {
    void* data = nullptr;
    check_cuda(cudaMalloc(&data, size_ * sizeof(T)));
    data_ = static_cast<T*>(data);
    check_cuda(cudaMemcpy(data_, values.data(), size_ * sizeof(T), cudaMemcpyDefault));
  }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() { check_cuda(cudaFree(data_)); }

  T* data() const { return data_; }
  // What is there after all that was queued.
  std::vector<T> host() const {
    check_cuda(cudaDeviceSynchronize());
    std::unique_ptr<T[]> values(new T[size_]);
    check_cuda(cudaMemcpy(values.get(), data_, size_ * sizeof(T), cudaMemcpyDefault));
    return std::vector<T>(values.get(), values.get() + size_);
  }

 private:
  size_t size_;
  T* data_;
};

// Flags, which std::vector<bool> does not hold as bytes.
static_assert(sizeof(bool) == 1, "a bool is a byte");

bool* flags(std::vector<uint8_t>& bytes) {
  return reinterpret_cast<bool*>(bytes.data());
}
bool* flags(const DeviceArray<uint8_t>& bytes) {
  return reinterpret_cast<bool*>(bytes.data());
}

template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

bool close(float a, float b, float relative, float absolute) {
  return std::isnan(a) ? std::isnan(b) : a == b || std::fabs(a - b) <= absolute + relative * std::fabs(b);
}

float normal() {
  return std::normal_distribution<float>(0.0f, 2.0f)(engine);
}

// --- float16 ---------------------------------------------------------------------------------------------------------

struct Float16 {
  uint16_t bits;
};

// Truncates; NaN and infinities stay, small values become 0.
void from_float(float value, Float16* result) {
  int exponent = 0;
  const float mantissa = std::frexp(std::fabs(value), &exponent);  // in [0.5, 1)
  uint16_t bits = 0x7c00;                                          // infinity
  if (std::isnan(value)) {
    bits = 0x7e00;
  } else if (std::isfinite(value) && exponent < 16) {
    bits = exponent < -13 || value == 0.0f
               ? 0
               : static_cast<uint16_t>((exponent + 14) << 10 | (static_cast<int>(mantissa * 2048) & 1023));
  }
  result->bits = static_cast<uint16_t>(bits | (std::signbit(value) ? 0x8000 : 0));
}

float to_float(Float16 value) {
  const int exponent = value.bits >> 10 & 31, mantissa = value.bits & 1023;
  const float sign = (value.bits >> 15) != 0 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa != 0 ? kNan : sign * kInf;
  return exponent == 0 ? sign * 0.0f : sign * std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
}

template <typename T>
llm2_fast_dtype dtype_of();
template <>
llm2_fast_dtype dtype_of<float>() {
  return LLM2_FAST_FLOAT32;
}
template <>
llm2_fast_dtype dtype_of<BFloat16>() {
  return LLM2_FAST_BFLOAT16;
}
template <>
llm2_fast_dtype dtype_of<Float16>() {
  return LLM2_FAST_FLOAT16;
}

// --- select_candidates -----------------------------------------------------------------------------------------------

struct Selection {
  std::vector<int32_t> ids, count;
  std::vector<float> logits, logsumexp;
  std::vector<uint8_t> cut;
};

struct SelectionCase {
  int64_t vocab_size, row_stride, max_candidates;
  std::vector<float> log_alpha;  // [B]
  std::vector<int32_t> top_k;    // [B]

  int64_t batch_size() const { return static_cast<int64_t>(log_alpha.size()); }
  llm2_fast_select_candidates_args sizes() const {
    llm2_fast_select_candidates_args args = {};
    args.struct_size = sizeof(args);
    args.batch_size = batch_size();
    args.vocab_size = vocab_size;
    args.max_candidates = max_candidates;
    args.logits_row_stride = row_stride;
    return args;
  }
  Selection outputs() const {
    const size_t rows = log_alpha.size(), width = static_cast<size_t>(max_candidates);
    return {std::vector<int32_t>(rows * width, -7), std::vector<int32_t>(rows, -7),
            std::vector<float>(rows * width, -7.0f), std::vector<float>(rows, -7.0f), std::vector<uint8_t>(rows, 2)};
  }
};

template <typename T>
Selection select_on_cpu(const SelectionCase& c, const std::vector<T>& logits) {
  std::vector<float> values;  // the CPU does not know float16; the others are the same in float32
  for (T logit : logits) values.push_back(to_float(logit));
  Selection selection = c.outputs();
  llm2_fast_select_candidates_args args = c.sizes();
  args.dtype = LLM2_FAST_FLOAT32;
  args.logits = values.data();
  args.log_alpha = c.log_alpha.data();
  args.candidate_top_k = c.top_k.data();
  args.ids = selection.ids.data();
  args.candidate_logits = selection.logits.data();
  args.count = selection.count.data();
  args.logsumexp = selection.logsumexp.data();
  args.cut = flags(selection.cut);
  check_status(llm2_fast_select_candidates(&args, 1));
  return selection;
}

template <typename T>
Selection select_on_gpu(const SelectionCase& c, const std::vector<T>& logits) {
  const Selection outputs = c.outputs();
  llm2_fast_select_candidates_args args = c.sizes();
  size_t bytes = 0;
  check_status(llm2_fast_cuda_select_candidates_workspace(&args, &bytes));
  const DeviceArray<T> device_logits(logits);
  const DeviceArray<float> log_alpha(c.log_alpha), candidate_logits(outputs.logits), logsumexp(outputs.logsumexp);
  const DeviceArray<int32_t> top_k(c.top_k), ids(outputs.ids), count(outputs.count);
  const DeviceArray<uint8_t> cut(outputs.cut), workspace(std::vector<uint8_t>(bytes, 0xa5));
  args.dtype = dtype_of<T>();
  args.logits = device_logits.data();
  args.log_alpha = log_alpha.data();
  args.candidate_top_k = top_k.data();
  args.ids = ids.data();
  args.candidate_logits = candidate_logits.data();
  args.count = count.data();
  args.logsumexp = logsumexp.data();
  args.cut = flags(cut);
  check_status(llm2_fast_cuda_select_candidates(&args, workspace.data(), bytes, nullptr));
  return {ids.host(), count.host(), candidate_logits.host(), logsumexp.host(), cut.host()};
}

template <typename T>
void check_selection(const SelectionCase& c, const std::vector<T>& logits) {
  const Selection expected = select_on_cpu(c, logits), actual = select_on_gpu(c, logits);
  CHECK(same_bits(actual.ids, expected.ids));
  CHECK(same_bits(actual.logits, expected.logits));
  CHECK(same_bits(actual.count, expected.count));
  CHECK(same_bits(actual.cut, expected.cut));
  for (size_t row = 0; row < c.log_alpha.size(); ++row) {
    CHECK(close(actual.logsumexp[row], expected.logsumexp[row], 3e-7f, 2e-6f));
  }
  // A row alone gives the same bits.
  const SelectionCase alone = {c.vocab_size, c.row_stride, c.max_candidates, {c.log_alpha.back()}, {c.top_k.back()}};
  const Selection again = select_on_gpu(alone, std::vector<T>(logits.end() - c.row_stride, logits.end()));
  CHECK(std::memcmp(&again.logsumexp.back(), &actual.logsumexp.back(), sizeof(float)) == 0);
}

// A row of every kind.
template <typename T>
std::vector<T> special_rows(int64_t vocab_size, int64_t row_stride) {
  constexpr int kKinds = 9;
  std::vector<float> values;
  for (int kind = 0; kind < kKinds; ++kind) {
    for (int64_t i = 0; i < row_stride; ++i) {
      float value = normal();
      if (kind == 1) value = 1.5f;
      if (kind == 2) value = -kInf;
      if (kind == 3) value = i == vocab_size / 2 ? kNan : -kInf;
      if (kind == 4) value = i == vocab_size - 1 ? kNan : value;
      if (kind == 5) value = i == 0 ? kInf : value;
      if (kind == 6) value = i % 3 == 0 ? -kInf : value;
      if (kind == 7) value = i % 2 == 0 ? 0.0f : -0.0f;
      if (kind == 8) value = std::round(value);
      values.push_back(i < vocab_size ? value : kNan);  // padding is not read
    }
  }
  std::vector<T> logits(values.size());
  for (size_t i = 0; i < values.size(); ++i) from_float(values[i], &logits[i]);
  return logits;
}

template <typename T>
void test_select_candidates(const std::vector<int64_t>& vocab_sizes) {
  for (int64_t vocab_size : vocab_sizes) {
    for (int64_t row_stride : {vocab_size, (vocab_size + 7) / 8 * 8}) {
      current_case = "select_candidates dtype=" + std::to_string(dtype_of<T>()) + " V=" + std::to_string(vocab_size) +
                     " stride=" + std::to_string(row_stride);
      const std::vector<T> logits = special_rows<T>(vocab_size, row_stride);
      const size_t rows = logits.size() / static_cast<size_t>(row_stride);
      const auto check = [&](int64_t max_candidates, float log_alpha, int32_t top_k) {
        check_selection<T>({vocab_size, row_stride, max_candidates, std::vector<float>(rows, log_alpha),
                            std::vector<int32_t>(rows, top_k)},
                           logits);
      };
      check(32, std::log(0.1f), 0);
      // Every row with options of its own.
      SelectionCase mixed = {vocab_size, row_stride, 40, {}, {}};
      for (size_t row = 0; row < rows; ++row) {
        mixed.log_alpha.push_back(std::vector<float>{0.0f, -0.5f, -20.0f, kNan, 1.0f}[row % 5]);
        mixed.top_k.push_back(std::vector<int32_t>{0, 3, 100, 1}[row % 4]);
      }
      check_selection<T>(mixed, logits);
      if (row_stride == vocab_size) continue;
      check(1, std::log(0.1f), 0);
      check(1024, -kInf, 0);
      check(33, -kInf, 33);
    }
  }
}

// --- adjust_and_pick -------------------------------------------------------------------------------------------------

struct Picks {
  std::vector<int32_t> index, token, system1_index;
  std::vector<float> logprob, adjusted;
  std::vector<uint8_t> finished;
};

struct PickCase {
  int64_t max_candidates, num_eos;
  std::vector<int32_t> ids, count, top_k, step, sample_index, request_id, eos;
  std::vector<float> logits, scores, beta, penalty, temperature, top_p, log_min_p;
  std::vector<int64_t> seed;
  std::vector<uint8_t> seen;

  Picks outputs() const {
    const size_t rows = count.size();
    const std::vector<int32_t> integers(rows, -7);
    return {integers,
            integers,
            integers,
            std::vector<float>(rows, -7.0f),
            std::vector<float>(rows * static_cast<size_t>(max_candidates), -7.0f),
            std::vector<uint8_t>(rows, 2)};
  }
};

// Arguments over arrays on either side: `at(array)` is its address.
template <typename At>
llm2_fast_adjust_and_pick_args pick_args(const PickCase& c, const At& at) {
  llm2_fast_adjust_and_pick_args args = {};
  args.struct_size = sizeof(args);
  args.batch_size = static_cast<int64_t>(c.count.size());
  args.max_candidates = c.max_candidates;
  args.num_eos = c.num_eos;
  args.candidate_ids = at(c.ids);
  args.candidate_ids_row_stride = c.max_candidates;
  args.candidate_logits = at(c.logits);
  args.candidate_logits_row_stride = c.max_candidates;
  args.count = at(c.count);
  args.scores = c.scores.empty() ? nullptr : at(c.scores);
  args.scores_row_stride = c.max_candidates;
  args.beta = at(c.beta);
  args.seen = c.seen.empty() ? nullptr : at(c.seen);
  args.seen_row_stride = c.max_candidates;
  args.repetition_penalty = at(c.penalty);
  args.temperature = at(c.temperature);
  args.top_k = at(c.top_k);
  args.top_p = at(c.top_p);
  args.log_min_p = at(c.log_min_p);
  args.seed = at(c.seed);
  args.step = at(c.step);
  args.sample_index = at(c.sample_index);
  args.request_id = at(c.request_id);
  args.eos_token_ids = at(c.eos);
  args.eos_token_ids_row_stride = c.num_eos;
  return args;
}

Picks pick_on_cpu(const PickCase& c) {
  Picks picks = c.outputs();
  llm2_fast_adjust_and_pick_args args = pick_args(c, [](const auto& array) { return array.data(); });
  args.index = picks.index.data();
  args.token = picks.token.data();
  args.logprob = picks.logprob.data();
  args.system1_index = picks.system1_index.data();
  args.adjusted = picks.adjusted.data();
  args.finished = flags(picks.finished);
  check_status(llm2_fast_adjust_and_pick(&args, 1));
  return picks;
}

Picks pick_on_gpu(const PickCase& c) {
  const Picks outputs = c.outputs();
  const DeviceArray<int32_t> index(outputs.index), token(outputs.token), system1_index(outputs.system1_index);
  const DeviceArray<float> logprob(outputs.logprob), adjusted(outputs.adjusted);
  const DeviceArray<uint8_t> finished(outputs.finished);
  std::vector<std::shared_ptr<void>> inputs;  // kept until the end
  llm2_fast_adjust_and_pick_args args = pick_args(c, [&](const auto& array) {
    using T = std::decay_t<decltype(array[0])>;
    const auto copy = std::make_shared<DeviceArray<T>>(array);
    inputs.push_back(copy);
    return const_cast<const T*>(copy->data());
  });
  args.index = index.data();
  args.token = token.data();
  args.logprob = logprob.data();
  args.system1_index = system1_index.data();
  args.adjusted = adjusted.data();
  args.finished = flags(finished);
  check_status(llm2_fast_cuda_adjust_and_pick(&args, nullptr));
  return {index.host(), token.host(), system1_index.host(), logprob.host(), adjusted.host(), finished.host()};
}

template <typename T>
T one_of(const std::vector<T>& values) {
  return values[std::uniform_int_distribution<size_t>(0, values.size() - 1)(engine)];
}

PickCase random_pick(size_t rows, int64_t width, bool scored, bool penalized) {
  PickCase c;
  c.max_candidates = width;
  c.num_eos = 3;
  for (size_t row = 0; row < rows; ++row) {
    std::vector<int32_t> ids;
    for (int32_t i = 0; i < width; ++i) ids.push_back(3 * i + 1);
    std::shuffle(ids.begin(), ids.end(), engine);
    c.ids.insert(c.ids.end(), ids.begin(), ids.end());
    const bool coarse = one_of<int>({0, 0, 1}) == 1;  // many ties
    for (int64_t i = 0; i < width; ++i) {
      c.logits.push_back(coarse ? std::round(normal()) : normal());
      if (scored) c.scores.push_back(coarse ? 2.0f * std::round(normal()) : normal());
      if (penalized) c.seen.push_back(static_cast<uint8_t>(one_of<int>({0, 0, 7})));
    }
    c.count.push_back(
        static_cast<int32_t>(one_of<int64_t>({width, width, width, (width + 1) / 2, 1, 0, -2, width + 5})));
    c.beta.push_back(one_of<float>({0.0f, 0.25f, 3.0f}));
    c.penalty.push_back(one_of<float>({1.0f, 1.3f, 0.5f}));
    c.temperature.push_back(one_of<float>({0.0f, 1.0f, 0.7f, 3.0f, 1e-4f}));
    c.top_k.push_back(static_cast<int32_t>(one_of<int64_t>({0, 0, 1, 5, width, width + 1})));
    c.top_p.push_back(one_of<float>({1.0f, 1.0f, 0.9f, 0.3f, 1e-6f, 0.0f}));
    c.log_min_p.push_back(one_of<float>({-kInf, -kInf, std::log(0.05f), 0.0f}));
    c.seed.push_back(one_of<int64_t>({0, 42, -7, int64_t{1} << 40}));
    c.step.push_back(one_of<int32_t>({0, 1, 1000}));
    c.sample_index.push_back(one_of<int32_t>({0, 3}));
    c.request_id.push_back(static_cast<int32_t>(row));
    for (int32_t i = 0; i < c.num_eos; ++i) c.eos.push_back(i == 2 ? -1 : one_of(ids));
  }
  return c;
}

// Puts values into the logits and scores that rows are not decided for, or that overflow.
void make_special(PickCase* c) {
  const size_t width = static_cast<size_t>(c->max_candidates);
  for (size_t row = 0; row < c->count.size(); ++row) {
    std::vector<float>& values = c->scores.empty() || row % 2 == 0 ? c->logits : c->scores;
    const size_t i = row * width + std::uniform_int_distribution<size_t>(0, width - 1)(engine);
    values[i] = std::vector<float>{kNan, kInf, -kInf, 3e38f, -3e38f}[row % 5];
    if (row % 7 == 6) std::fill_n(values.begin() + static_cast<int64_t>(row * width), width, -kInf);
  }
}

// The row with other rounding: what the CPU gives when options change by less than they mean.
std::vector<Picks> neighbours(const PickCase& c) {
  std::vector<Picks> picks;
  for (float factor : {1.0f - 1e-5f, 1.0f + 1e-5f}) {
    PickCase other = c;
    for (float& top_p : other.top_p) top_p = top_p < 1.0f ? top_p * factor : top_p;
    picks.push_back(pick_on_cpu(other));
    other = c;
    for (float& temperature : other.temperature) temperature *= factor;
    picks.push_back(pick_on_cpu(other));
  }
  return picks;
}

struct Agreement {
  int rows = 0;
  int near = 0;  // differ by rounding only
};

void check_pick(const PickCase& c, Agreement* agreement) {
  const Picks expected = pick_on_cpu(c), actual = pick_on_gpu(c);
  CHECK(same_bits(actual.adjusted, expected.adjusted));
  for (size_t row = 0; row < c.count.size(); ++row) {
    ++agreement->rows;
    const auto same = [&](const Picks& picks) {
      return actual.index[row] == picks.index[row] && actual.system1_index[row] == picks.system1_index[row];
    };
    if (!same(expected)) {
      const std::vector<Picks> others = neighbours(c);
      CHECK(std::any_of(others.begin(), others.end(), same));
      ++agreement->near;
      continue;
    }
    CHECK(actual.token[row] == expected.token[row]);
    CHECK(actual.finished[row] == expected.finished[row]);
    CHECK(close(actual.logprob[row], expected.logprob[row], 1e-6f, 8e-6f));
  }
}

void test_adjust_and_pick() {
  Agreement agreement;
  for (int64_t width : {1, 31, 100, 1500}) {
    for (bool scored : {false, true}) {
      for (bool penalized : {false, true}) {
        current_case =
            "adjust_and_pick K=" + std::to_string(width) + (scored ? " scored" : "") + (penalized ? " penalized" : "");
        PickCase c = random_pick(width < 1000 ? 30 : 4, width, scored, penalized);
        check_pick(c, &agreement);
        make_special(&c);
        check_pick(c, &agreement);
      }
    }
  }
  current_case = "adjust_and_pick";
  std::printf("%d rows picked, %d of them differ by rounding only\n", agreement.rows, agreement.near);
  CHECK(agreement.near * 100 <= agreement.rows);
}

// --- commit ----------------------------------------------------------------------------------------------------------

template <typename T>
void test_commit(int64_t head_dim, int64_t hidden_size, bool hidden) {
  current_case = "commit head_dim=" + std::to_string(head_dim) + " hidden_size=" + std::to_string(hidden_size);
  constexpr int64_t kLayers = 3, kRows = 7, kHeads = 2, kBlocks = 9, kBlockSize = 4, kSlots = 4, kMaxBlocks = 2;
  const std::vector<int32_t> index = {1, -1, 0}, first_row = {0, 2, 5}, slots = {3, 0, 1};
  const std::vector<int32_t> table = {0, 1, 7, 2, 3, 8, 6, 5}, lengths = {3, 4, 1, 7};
  int counter = 0;
  const auto filled = [&](int64_t size) {
    std::vector<T> values(static_cast<size_t>(size));
    for (T& value : values) from_float(static_cast<float>(++counter % 251), &value);
    return values;
  };
  const std::vector<T> own_key = filled(kLayers * kRows * kHeads * head_dim),
                       own_value = filled(kLayers * kRows * kHeads * head_dim);
  const std::vector<T> rows = filled(kRows * hidden_size), states = filled(kSlots * hidden_size);
  const std::vector<T> keys = filled(kLayers * kBlocks * kHeads * kBlockSize * head_dim),
                       values = filled(kLayers * kBlocks * kHeads * kBlockSize * head_dim);
  llm2_fast_commit_args args = {};
  args.struct_size = sizeof(args);
  args.batch_size = 3;
  args.num_rows = kRows;
  args.num_layers = kLayers;
  args.num_kv_heads = kHeads;
  args.head_dim = head_dim;
  args.hidden_size = hidden_size;
  args.num_blocks = kBlocks;
  args.block_size = kBlockSize;
  args.num_slots = kSlots;
  args.max_blocks = kMaxBlocks;
  args.dtype = dtype_of<T>();
  args.block_table_row_stride = kMaxBlocks;

  std::vector<T> cpu_keys = keys, cpu_values = values, cpu_states = states;
  std::vector<int32_t> cpu_lengths = lengths;
  llm2_fast_commit_args cpu = args;
  cpu.index = index.data();
  cpu.first_row = first_row.data();
  cpu.slots = slots.data();
  cpu.own_key = own_key.data();
  cpu.own_value = own_value.data();
  cpu.hidden = hidden ? rows.data() : nullptr;
  cpu.keys = cpu_keys.data();
  cpu.values = cpu_values.data();
  cpu.block_table = table.data();
  cpu.hidden_states = hidden ? cpu_states.data() : nullptr;
  cpu.lengths = cpu_lengths.data();
  check_status(llm2_fast_commit(&cpu));
  CHECK(!same_bits(cpu_keys, keys) && cpu_lengths == std::vector<int32_t>({3, 5, 1, 8}));

  const DeviceArray<int32_t> gpu_index(index), gpu_first_row(first_row), gpu_slots(slots), gpu_table(table);
  const DeviceArray<int32_t> gpu_lengths(lengths);
  const DeviceArray<T> gpu_own_key(own_key), gpu_own_value(own_value), gpu_rows(rows);
  const DeviceArray<T> gpu_keys(keys), gpu_values(values), gpu_states(states);
  args.index = gpu_index.data();
  args.first_row = gpu_first_row.data();
  args.slots = gpu_slots.data();
  args.own_key = gpu_own_key.data();
  args.own_value = gpu_own_value.data();
  args.hidden = hidden ? gpu_rows.data() : nullptr;
  args.keys = gpu_keys.data();
  args.values = gpu_values.data();
  args.block_table = gpu_table.data();
  args.hidden_states = hidden ? gpu_states.data() : nullptr;
  args.lengths = gpu_lengths.data();
  check_status(llm2_fast_cuda_commit(&args, nullptr));
  CHECK(same_bits(gpu_keys.host(), cpu_keys));
  CHECK(same_bits(gpu_values.host(), cpu_values));
  CHECK(same_bits(gpu_states.host(), cpu_states));
  CHECK(gpu_lengths.host() == cpu_lengths);
}

// --- refusals --------------------------------------------------------------------------------------------------------

void test_refusals() {
  current_case = "refusals";
  const SelectionCase c = {10, 10, 4, {0.0f}, {0}};
  llm2_fast_select_candidates_args args = c.sizes();
  size_t bytes = 0;
  check_status(llm2_fast_cuda_select_candidates_workspace(&args, &bytes));
  check_refused(llm2_fast_cuda_select_candidates_workspace(&args, nullptr), "bytes: expected a pointer, got NULL");
  args.max_candidates = 1025;
  check_refused(llm2_fast_cuda_select_candidates_workspace(&args, &bytes),
                "max_candidates: expected <= 1024, got 1025");
  args.max_candidates = 4;

  const DeviceArray<float> floats(std::vector<float>(64, 0.0f));
  const DeviceArray<int32_t> integers(std::vector<int32_t>(64, 0));
  const DeviceArray<uint8_t> workspace(std::vector<uint8_t>(bytes + 16, 0));
  args.dtype = LLM2_FAST_FLOAT32;
  args.logits = args.log_alpha = floats.data();
  args.candidate_top_k = integers.data();
  args.ids = args.count = integers.data();
  args.candidate_logits = args.logsumexp = floats.data();
  args.cut = flags(workspace);
  check_refused(llm2_fast_cuda_select_candidates(&args, workspace.data(), bytes - 1, nullptr),
                "workspace_bytes: expected >= " + std::to_string(bytes) + ", got " + std::to_string(bytes - 1));
  check_refused(llm2_fast_cuda_select_candidates(&args, workspace.data() + 8, bytes, nullptr),
                "workspace: expected a pointer aligned to 16 bytes, got another");
  args.log_alpha = nullptr;
  check_refused(llm2_fast_cuda_select_candidates(&args, workspace.data(), bytes, nullptr),
                "log_alpha: expected a pointer, got NULL");
  args = {};
  args.struct_size = sizeof(args);
  args.vocab_size = args.max_candidates = 1;
  args.dtype = LLM2_FAST_FLOAT16;
  check_status(llm2_fast_cuda_select_candidates(&args, nullptr, 0, nullptr));  // no rows

  llm2_fast_adjust_and_pick_args pick = {};
  pick.struct_size = sizeof(pick);
  pick.max_candidates = (int64_t{1} << 20) + 1;
  check_refused(llm2_fast_cuda_adjust_and_pick(&pick, nullptr), "max_candidates: expected <= 1048576, got 1048577");
  check_refused(llm2_fast_cuda_commit(nullptr, nullptr), "args: expected a struct, got NULL");
}

}  // namespace

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("no GPU\n");
    return 77;
  }
  test_select_candidates<float>({1, 31, 4096, 4097, 9001});
  test_select_candidates<BFloat16>({31, 4097});
  test_select_candidates<Float16>({31, 4097});
  test_adjust_and_pick();
  for (bool hidden : {true, false}) {
    test_commit<float>(6, 10, hidden);
    test_commit<float>(8, 12, hidden);
    test_commit<BFloat16>(8, 20, hidden);
    test_commit<BFloat16>(64, 32, hidden);
  }
  test_refusals();
  return report();
}
