#include "llm2_fast/decoder.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels.h"
#include "llm2_fast/thread_pool.h"
#include "paged_storage.h"
#include "prefix_stream.h"

namespace llm2_fast {
namespace {

constexpr int64_t kPhasesPerLayer = 15;  // at most: many rows, updates of all four linear layers, output norms, a head
// So few rows every worker normalizes for itself: that takes less time than one more phase.
constexpr int64_t kFewRows = 8;
constexpr int64_t kItemsPerWorker = 4;  // fewer are divided further
// Of the next layer: in all, a fraction of a second-level cache, and before looking whether the others are done.
constexpr int64_t kPrefetchedBytes = 262144;
constexpr int64_t kPrefetchedAtOnce = 32768;

int64_t round_up_to_even(int64_t value) {
  return value + value % 2;
}

char* at(const AlignedBuffer& buffer, int64_t index, int64_t element_size) {
  return static_cast<char*>(buffer.data()) + index * element_size;
}

float* floats(const AlignedBuffer& buffer, int64_t index = 0) {
  return static_cast<float*>(buffer.data()) + index;
}

std::array<const AdaptedLinear*, 4> linear_layers(const DecoderLayer& layer) {
  return {&layer.qkv, &layer.o, &layer.gate_up, &layer.down};
}

// The largest rank, made even.
int64_t widest_update(const DecoderWeights& weights) {
  int64_t widest = 0;
  for (const DecoderLayer& layer : weights.layers) {
    for (const AdaptedLinear* linear : linear_layers(layer)) {
      if (linear->lora_a) widest = std::max(widest, round_up_to_even(linear->lora_a->out_features()));
    }
  }
  return widest;
}

float rounded(float value, DType dtype) {
  if (dtype == DType::kFloat32) return value;
  BFloat16 result;
  from_float(value, &result);
  return to_float(result);
}

}  // namespace

// Asks for the beginning of a worker's share of a layer, piece by piece, so that memory has something to do while the
// worker waits.
class Prefetch {
 public:
  // Of `linear`, or nothing for null.
  Prefetch(const PackedLinear* linear, const Worker& worker) {
    if (linear != nullptr) begin(*linear, worker);
  }

  // Of what a pass reads first of `linear`: its update's A, if that is `updated` and a share of it is this worker's.
  Prefetch(const AdaptedLinear* linear, bool updated, const Worker& worker) {
    if (linear == nullptr) return;
    if (updated && linear->lora_a) begin(*linear->lora_a, worker);
    if (next_ == end_) begin(*linear->weight, worker);
  }

  // False once all is asked for.
  bool operator()() {
    const char* end = end_ - next_ > kPrefetchedAtOnce ? next_ + kPrefetchedAtOnce : end_;
    for (; next_ < end; next_ += kCacheLine) prefetch(next_);
    return next_ < end_;
  }

 private:
  void begin(const PackedLinear& linear, const Worker& worker) {
    const RowRange panels = worker.share(linear.num_panels());
    next_ = static_cast<const char*>(linear.panels().packed) + panels.begin * linear.panel_bytes();
    end_ = next_ + std::min(kPrefetchedBytes, (panels.end - panels.begin) * linear.panel_bytes());
  }

  const char* next_ = nullptr;
  const char* end_ = nullptr;
};

// A part of the prefix that a tile attends to.
struct AttentionPart {
  int64_t tile;
  int64_t part;
  int64_t num_parts;    // of the tile
  int64_t first_state;  // of the tile's, in units of one key/value head's states
};

// Buffers of a pass over up to `capacity` rows. Padding is zero from the start and never written.
struct Decoder::Workspace {
  int64_t capacity = 0;
  const int64_t gated_stride, lora_stride;
  int64_t features_stride = 0;
  AlignedBuffer residual;            // float32 [rows, hidden_size]
  AlignedBuffer normed;              // [rows, hidden_size]; after the pass the final hidden states
  AlignedBuffer qkv;                 // float32 [rows, num_heads + 2 * num_kv_heads, head_dim]
  AlignedBuffer query, attended;     // [rows, num_heads, head_dim]
  AlignedBuffer own_key, own_value;  // [num_layers, capacity, num_kv_heads, head_dim]
  AlignedBuffer gated;               // [rows, gated_stride]
  AlignedBuffer lora;                // [rows, lora_stride]
  AlignedBuffer projected;           // float32 [rows, hidden_size]: what an output norm reads
  AlignedBuffer angles;              // float32 [rotary tables, capacity, 2, head_dim / 2]
  AlignedBuffer features;        // float32 [rows, features_stride]: what the score head reads, then its hidden layer
  std::vector<uint8_t> has_own;  // [rows], all true
  std::vector<AlignedBuffer> scratch;     // per thread
  std::vector<AlignedBuffer> few_normed;  // per thread, [kFewRows, hidden_size]
  int64_t linear_rows = 0;
  std::vector<AlignedBuffer> linear;         // per thread, the workspace of linear layers
  std::vector<AlignedBuffer> operands;       // per thread, what a linear layer and its update read
  std::vector<std::vector<PrefixRun>> runs;  // per thread, what its attention reads in a layer
  std::vector<RowRange> tiles;               // rows of one slot and one cache each
  std::vector<AttentionPart> parts;          // of all tiles, if threads are to share a tile
  std::vector<float> part_states;
  std::unique_ptr<std::atomic<int64_t>[]> finished_parts;  // [tiles, num_kv_heads]
  std::vector<int32_t> slots, positions;                   // of the last pass
  std::vector<uint8_t> stored;
  int64_t selection_capacity = 0;
  AlignedBuffer last;                  // [rows, hidden_size]
  AlignedBuffer panel_max, panel_sum;  // float32 [rows, panels of lm_head]
  std::vector<LogitRanking> rankings;  // [threads, rows]
  std::vector<float> ranked_logits;    // [threads, rows, capacity of a ranking]
  std::vector<int32_t> ranked_ids;

  explicit Workspace(const DecoderWeights& weights)
      : gated_stride(round_up_to_even(weights.spec.intermediate_size)), lora_stride(widest_update(weights)) {}
  void reserve(const DecoderWeights& weights, int64_t rows, int64_t head_features);
  void reserve_threads(const DecoderWeights& weights, int num_threads, int64_t scratch_bytes);
  void reserve_linear(const DecoderWeights& weights, const KernelTable& table, int64_t rows, int num_threads);
  void reserve_selection(const DecoderWeights& weights, int64_t rows);
  void clear_rankings(int num_threads, int64_t rows, int64_t capacity);
};

void Decoder::Workspace::reserve(const DecoderWeights& weights, int64_t rows, int64_t head_features) {
  if (rows <= capacity && head_features <= features_stride) return;
  const DecoderSpec& spec = weights.spec;
  const int64_t element = size_of(spec.dtype), layers = static_cast<int64_t>(weights.layers.size());
  const int64_t kv_size = spec.num_kv_heads * spec.head_dim, q_size = spec.num_heads * spec.head_dim;
  rows = std::max(rows, capacity);
  capacity = 0;  // until all buffers are there
  features_stride = std::max(features_stride, head_features);
  residual = AlignedBuffer(rows * spec.hidden_size * 4);
  normed = AlignedBuffer(rows * spec.hidden_size * element);
  qkv = AlignedBuffer(rows * (q_size + 2 * kv_size) * 4);
  query = AlignedBuffer(rows * q_size * element);
  attended = AlignedBuffer(rows * q_size * element);
  own_key = AlignedBuffer(layers * rows * kv_size * element);
  own_value = AlignedBuffer(layers * rows * kv_size * element);
  gated = AlignedBuffer(rows * gated_stride * element);
  lora = AlignedBuffer(rows * lora_stride * element);
  projected = AlignedBuffer(rows * spec.hidden_size * 4);
  angles = AlignedBuffer(static_cast<int64_t>(spec.rotary_tables.size()) * rows * spec.head_dim * 4);
  features = AlignedBuffer(rows * features_stride * 4);
  has_own.assign(static_cast<size_t>(rows), 1);
  capacity = rows;
}

void Decoder::Workspace::reserve_threads(const DecoderWeights& weights, int num_threads, int64_t scratch_bytes) {
  const int64_t normed_bytes = kFewRows * weights.spec.hidden_size * size_of(weights.spec.dtype);
  while (static_cast<int>(scratch.size()) < num_threads) {
    scratch.emplace_back(scratch_bytes);
    few_normed.emplace_back(normed_bytes);
    runs.emplace_back();
  }
}

void Decoder::Workspace::reserve_linear(const DecoderWeights& weights, const KernelTable& table, int64_t rows,
                                        int num_threads) {
  if (rows <= linear_rows && static_cast<int>(linear.size()) >= num_threads) return;
  rows = std::max(rows, linear_rows);
  linear_rows = 0;  // until all buffers are there
  linear.clear();
  operands.clear();
  const DecoderSpec& spec = weights.spec;
  int64_t bytes = weights.lm_head ? table.linear_workspace(spec.dtype, weights.lm_head->panels(), rows) : 0;
  for (const DecoderLayer& layer : weights.layers) {
    for (const AdaptedLinear* adapted : linear_layers(layer)) {
      bytes = std::max(bytes, table.linear_workspace(spec.dtype, adapted->weight->panels(), rows));
      if (adapted->lora_a) {
        bytes = std::max(bytes, table.linear_workspace(spec.dtype, adapted->lora_a->panels(), rows));
      }
    }
  }
  const int64_t depth = std::max({spec.hidden_size, spec.num_heads * spec.head_dim, gated_stride});
  const int64_t operand_bytes = table.operands_size(spec.dtype, rows, depth + lora_stride);
  for (int i = 0; i < num_threads; ++i) {
    linear.emplace_back(bytes);
    operands.emplace_back(operand_bytes);
  }
  linear_rows = rows;
}

void Decoder::Workspace::reserve_selection(const DecoderWeights& weights, int64_t rows) {
  if (rows <= selection_capacity) return;
  last = AlignedBuffer(rows * weights.spec.hidden_size * size_of(weights.spec.dtype));
  panel_max = AlignedBuffer(rows * weights.lm_head->num_panels() * 4);
  panel_sum = AlignedBuffer(rows * weights.lm_head->num_panels() * 4);
  selection_capacity = rows;
}

void Decoder::Workspace::clear_rankings(int num_threads, int64_t rows, int64_t capacity) {
  const size_t count = static_cast<size_t>(num_threads * rows), size = static_cast<size_t>(capacity);
  if (ranked_ids.size() < count * size) {
    ranked_logits.resize(count * size);
    ranked_ids.resize(count * size);
  }
  rankings.clear();
  for (size_t i = 0; i < count; ++i) {
    rankings.push_back(
        {ranked_logits.data() + i * size, ranked_ids.data() + i * size, 0, -std::numeric_limits<float>::infinity()});
  }
}

// One forward pass, run by all workers together.
class Decoder::Pass {
 public:
  Pass(const Decoder& decoder, const PagedCache& cache, const DecoderRows& rows, const ScoreHead* head, float* scores)
      : weights_(decoder.weights_),
        spec_(decoder.weights_.spec),
        table_(kernels(decoder.isa_)),
        work_(*decoder.workspace_),
        cache_(cache),
        rows_(rows),
        head_(head),
        scores_(scores),
        element_(size_of(spec_.dtype)) {}

  int64_t scratch_bytes() const {
    return std::max(table_.branch_attention_workspace(attention_args(0, 0)), spec_.head_dim * int64_t{4});
  }

  void plan(int num_threads);
  void run(Worker& worker) const;

 private:
  class Normed;
  class Operands;
  class PrefixReader;

  void divide_tiles();
  void embed(int64_t row) const;
  void rotate(int64_t row) const;
  void run_layer(int64_t index, Worker& worker) const;
  template <typename Work>
  void each_row(Worker& worker, const Work& work) const;
  void normalize(const std::vector<float>& weight, int64_t row, const AlignedBuffer& output) const;
  template <typename Input>
  void apply(const AdaptedLinear& linear, Input&& input, int64_t input_stride, Epilogue epilogue, void* output,
             int64_t output_stride, const AdaptedLinear* next, Worker& worker) const;
  template <typename Input>
  void add_to_residual(const AdaptedLinear& linear, Input&& input, int64_t input_stride, const std::vector<float>& norm,
                       const AdaptedLinear* next, Worker& worker) const;
  void add_projected(const std::vector<float>& norm, int64_t row) const;
  void rope_and_store(int64_t index, RowRange rows, RowRange kv_heads, Worker& worker) const;
  void attend(int64_t index, const AdaptedLinear* next, Worker& worker) const;
  void attend_in_parts(PrefixReader& reader, const AdaptedLinear* next, Worker& worker) const;
  bool has_adapted() const { return rows_.first_adapted < rows_.count; }
  bool head_reads(int64_t layer) const;
  void capture(int64_t layer, int64_t row) const;
  void capture_final(int64_t row) const;
  void score(int64_t row) const;
  const PagedCache& cache_of(int64_t row) const;
  BranchAttentionArgs attention_args(int64_t index, int64_t row) const;

  const DecoderWeights& weights_;
  const DecoderSpec& spec_;
  const KernelTable& table_;
  Workspace& work_;
  const PagedCache& cache_;
  const DecoderRows& rows_;
  const ScoreHead* head_;
  float* scores_;
  int64_t element_;
  bool one_tile_per_slot_ = false;  // then no row attends to what another tile stores
};

// What a linear layer reads: the residual after its norm.
class Decoder::Pass::Normed {
 public:
  Normed(const Pass& pass, const std::vector<float>& weight, Worker& worker) : pass_(pass), weight_(weight) {
    if (pass.rows_.count <= kFewRows) {
      own_ = &pass.work_.few_normed[static_cast<size_t>(worker.index())];
      return;
    }
    pass.each_row(worker, [&](int64_t row) { pass.normalize(weight, row, pass.work_.normed); });
    data_ = pass.work_.normed.data();
  }

  // Called only by a worker with a share of the layer: the residual does not change before that is done.
  const void* operator()() {
    if (data_ == nullptr) {
      for (int64_t row = 0; row < pass_.rows_.count; ++row) pass_.normalize(weight_, row, *own_);
      data_ = own_->data();
    }
    return data_;
  }

 private:
  const Pass& pass_;
  const std::vector<float>& weight_;
  const AlignedBuffer* own_ = nullptr;
  const void* data_ = nullptr;
};

// What a linear layer reads, `rows` of `depth`, as operands. Each worker with a share of the layer makes them for
// itself, once.
class Decoder::Pass::Operands {
 public:
  Operands(const Pass& pass, int64_t rows, int64_t depth, void* buffer)
      : pass_(pass), rows_(rows), depth_(depth), buffer_(buffer) {}

  int64_t size() const { return pass_.table_.operands_size(pass_.spec_.dtype, rows_, depth_); }

  // `input()` is asked for at the first call.
  template <typename Input>
  const LinearInput& of(const Input& input) {
    if (made_.rows == nullptr) {
      made_ = pass_.table_.operands(pass_.spec_.dtype, input(), rows_, depth_, buffer_);
    }
    return made_;
  }

 private:
  const Pass& pass_;
  int64_t rows_, depth_;
  void* buffer_;
  LinearInput made_ = {nullptr, 0};
};

// Copies one position of keys or values [num_kv_heads, head_dim], those of `kv_heads`, to a slot of the cache.
static void store_position(const PagedCache& cache, const DecoderSpec& spec, int64_t layer, int64_t slot,
                           int64_t position, RowRange kv_heads, const void* row, void* storage) {
  const int64_t block = cache.block_table[slot * cache.block_table_row_stride + position / cache.block_size];
  store_in_block(storage, layer * cache.num_blocks + block, position % cache.block_size, cache.block_size,
                 spec.num_kv_heads, kv_heads, spec.head_dim * size_of(spec.dtype), row);
}

void Decoder::Pass::plan(int num_threads) {
  work_.tiles.clear();
  one_tile_per_slot_ = true;
  for (int64_t begin = 0; begin < rows_.count;) {
    const bool adapted = begin >= rows_.first_adapted;
    const int64_t limit = std::min(begin + kAttentionTileRows, adapted ? rows_.count : rows_.first_adapted);
    int64_t end = begin + 1;
    while (end < limit && rows_.slots[end] == rows_.slots[begin]) ++end;
    const bool first_of_cache = begin == 0 || begin == rows_.first_adapted;
    if (!first_of_cache && rows_.slots[begin - 1] == rows_.slots[begin]) one_tile_per_slot_ = false;
    work_.tiles.push_back({begin, end});
    begin = end;
  }
  work_.parts.clear();
  const int64_t items = static_cast<int64_t>(work_.tiles.size()) * spec_.num_kv_heads;
  if (num_threads > 1 && items < num_threads * kItemsPerWorker) divide_tiles();
}

// Divides tiles with a long prefix among threads; leaves `parts` empty if there are none.
void Decoder::Pass::divide_tiles() {
  int64_t num_states = 0, longest = 0;
  for (size_t tile = 0; tile < work_.tiles.size(); ++tile) {
    const RowRange rows = work_.tiles[tile];
    int64_t length = rows_.positions[rows.begin];
    for (int64_t row = rows.begin + 1; row < rows.end; ++row) {
      const int64_t step = int64_t{rows_.positions[row]} - rows_.positions[row - 1];
      if (step != 0 && step != 1) return work_.parts.clear();  // a tile has to see positions that touch
      length = rows_.positions[row];
    }
    const int64_t num_parts = std::max<int64_t>(1, (length + kAttentionPart - 1) / kAttentionPart);
    for (int64_t part = 0; part < num_parts; ++part) {
      work_.parts.push_back({static_cast<int64_t>(tile), part, num_parts, num_states});
    }
    num_states += num_parts;
    longest = std::max(longest, num_parts);
  }
  if (longest == 1) return work_.parts.clear();
  const int64_t states = num_states * spec_.num_kv_heads * table_.attention_state_size(attention_args(0, 0));
  if (static_cast<int64_t>(work_.part_states.size()) < states) work_.part_states.resize(static_cast<size_t>(states));
  const size_t counters = work_.tiles.size() * static_cast<size_t>(spec_.num_kv_heads);
  work_.finished_parts.reset(new std::atomic<int64_t>[counters]());
}

void Decoder::Pass::run(Worker& worker) const {
  each_row(worker, [&](int64_t row) {
    embed(row);
    rotate(row);
  });
  for (int64_t layer = 0; layer < static_cast<int64_t>(weights_.layers.size()); ++layer) run_layer(layer, worker);
  const int64_t first_scored = rows_.adapted_cache == nullptr ? 0 : rows_.first_adapted;
  each_row(worker, [&](int64_t row) {
    normalize(weights_.final_norm, row, work_.normed);
    if (head_ != nullptr && row >= first_scored) score(row);
  });
}

void Decoder::Pass::embed(int64_t row) const {
  const int64_t token = rows_.token_ids[row], size = spec_.hidden_size;
  float* residual = floats(work_.residual, row * size);
  if (weights_.embedding == nullptr) {
    weights_.lm_head->unpack_row(token, residual);
  } else if (spec_.dtype == DType::kFloat32) {
    std::memcpy(residual, static_cast<const float*>(weights_.embedding) + token * size, static_cast<size_t>(size) * 4);
  } else {
    const BFloat16* embedding = static_cast<const BFloat16*>(weights_.embedding) + token * size;
    for (int64_t i = 0; i < size; ++i) residual[i] = to_float(embedding[i]);
  }
  if (spec_.embedding_scale == 1.0f) return;
  for (int64_t i = 0; i < size; ++i) residual[i] = rounded(residual[i] * spec_.embedding_scale, spec_.dtype);
}

// Rotary angles of a row.
void Decoder::Pass::rotate(int64_t row) const {
  const int64_t half = spec_.head_dim / 2;
  for (size_t table = 0; table < spec_.rotary_tables.size(); ++table) {
    const RotaryTable& rotary = spec_.rotary_tables[table];
    float* angles = floats(work_.angles, (static_cast<int64_t>(table) * work_.capacity + row) * spec_.head_dim);
    for (int64_t i = 0; i < half; ++i) {
      const float angle = static_cast<float>(rows_.positions[row]) * rotary.inv_freq[static_cast<size_t>(i)];
      angles[i] = std::cos(angle) * rotary.scale;
      angles[i + half] = std::sin(angle) * rotary.scale;
    }
  }
}

void Decoder::Pass::run_layer(int64_t index, Worker& worker) const {
  const DecoderLayer& layer = weights_.layers[static_cast<size_t>(index)];
  const int64_t q_size = spec_.num_heads * spec_.head_dim, kv_size = spec_.num_kv_heads * spec_.head_dim;
  const int64_t hidden = spec_.hidden_size;
  const bool last = index + 1 == static_cast<int64_t>(weights_.layers.size());
  const AdaptedLinear* next_qkv = last ? nullptr : &weights_.layers[static_cast<size_t>(index + 1)].qkv;
  const Epilogue activation = spec_.activation == Activation::kSilu ? Epilogue::kSiluMul : Epilogue::kGeluTanhMul;
  apply(layer.qkv, Normed(*this, layer.input_norm, worker), hidden, Epilogue::kStoreFloat, work_.qkv.data(),
        q_size + 2 * kv_size, &layer.o, worker);
  attend(index, &layer.o, worker);
  add_to_residual(
      layer.o, [&] { return work_.attended.data(); }, q_size, layer.attention_output_norm, &layer.gate_up, worker);
  apply(layer.gate_up, Normed(*this, layer.mlp_input_norm, worker), hidden, activation, work_.gated.data(),
        work_.gated_stride, &layer.down, worker);
  add_to_residual(
      layer.down, [&] { return work_.gated.data(); }, work_.gated_stride, layer.mlp_output_norm, next_qkv, worker);
  if (head_reads(index)) each_row(worker, [&](int64_t row) { capture(index, row); });
}

template <typename Work>
void Decoder::Pass::each_row(Worker& worker, const Work& work) const {
  worker.each(rows_.count, [&](RowRange rows) {
    for (int64_t row = rows.begin; row < rows.end; ++row) work(row);
  });
}

void Decoder::Pass::normalize(const std::vector<float>& weight, int64_t row, const AlignedBuffer& output) const {
  const int64_t first = row * spec_.hidden_size;
  table_.rms_norm(spec_.dtype, floats(work_.residual, first), weight.data(), spec_.hidden_size, spec_.rms_norm_eps,
                  at(output, first, element_));
}

template <typename Input>
void Decoder::Pass::apply(const AdaptedLinear& linear, Input&& input, int64_t input_stride, Epilogue epilogue,
                          void* output, int64_t output_stride, const AdaptedLinear* next, Worker& worker) const {
  LinearArgs args = {};
  args.dtype = spec_.dtype;
  const int64_t first = rows_.first_adapted;
  const bool updated = linear.lora_a && has_adapted();
  const size_t index = static_cast<size_t>(worker.index());
  args.workspace = work_.linear[index].data();
  char* buffer = static_cast<char*>(work_.operands[index].data());
  if (updated) {
    args.rows = rows_.count - first;
    args.out_features = linear.lora_a->out_features();
    args.epilogue = Epilogue::kStore;
    args.output = at(work_.lora, first * work_.lora_stride, element_);
    args.output_stride = work_.lora_stride;
    Operands inputs(*this, args.rows, linear.lora_a->depth(), buffer);
    const auto work = [&](RowRange panels) {
      args.weights = {linear.lora_a->panels(), inputs.of([&] {
                        const char* rows = static_cast<const char*>(input());
                        return LinearInput{rows + first * input_stride * element_, input_stride};
                      })};
      table_.linear(args, panels);
    };
    worker.each(linear.lora_a->num_panels(), work, Prefetch(linear.weight.get(), worker));
    args.first_updated = first;
  }
  args.rows = rows_.count;
  args.out_features = linear.weight->out_features() / (is_gated(epilogue) ? 2 : 1);
  args.bias = linear.weight->bias();
  args.epilogue = epilogue;
  args.output = output;
  args.output_stride = output_stride;
  Operands inputs(*this, rows_.count, linear.weight->depth(), buffer);
  Operands updates(*this, rows_.count, work_.lora_stride, buffer + inputs.size());
  const auto work = [&](RowRange panels) {
    args.weights = {linear.weight->panels(), inputs.of([&] { return LinearInput{input(), input_stride}; })};
    if (updated) {
      args.update = {linear.lora_b->panels(),
                     updates.of([&] { return LinearInput{work_.lora.data(), work_.lora_stride}; })};
    }
    table_.linear(args, panels);
  };
  worker.each(linear.weight->num_panels(), work, Prefetch(next, has_adapted(), worker));
}

// Adds W x to the residual, after its norm if it has one.
template <typename Input>
void Decoder::Pass::add_to_residual(const AdaptedLinear& linear, Input&& input, int64_t input_stride,
                                    const std::vector<float>& norm, const AdaptedLinear* next, Worker& worker) const {
  if (norm.empty()) {
    return apply(linear, input, input_stride, Epilogue::kAdd, work_.residual.data(), spec_.hidden_size, next, worker);
  }
  apply(linear, input, input_stride, Epilogue::kStoreFloat, work_.projected.data(), spec_.hidden_size, next, worker);
  each_row(worker, [&](int64_t row) { add_projected(norm, row); });
}

void Decoder::Pass::add_projected(const std::vector<float>& norm, int64_t row) const {
  const int64_t size = spec_.hidden_size;
  float *projected = floats(work_.projected, row * size), *residual = floats(work_.residual, row * size);
  table_.rms_norm(DType::kFloat32, projected, norm.data(), size, spec_.rms_norm_eps, projected);
  for (int64_t i = 0; i < size; ++i) residual[i] += projected[i];
}

const PagedCache& Decoder::Pass::cache_of(int64_t row) const {
  return row >= rows_.first_adapted && rows_.adapted_cache != nullptr ? *rows_.adapted_cache : cache_;
}

void Decoder::Pass::rope_and_store(int64_t index, RowRange rows, RowRange kv_heads, Worker& worker) const {
  const DecoderLayer& layer = weights_.layers[static_cast<size_t>(index)];
  const int64_t kv_size = spec_.num_kv_heads * spec_.head_dim, first = index * work_.capacity * kv_size;
  char *own_key = at(work_.own_key, first, element_), *own_value = at(work_.own_value, first, element_);
  RopeArgs args = {};
  args.dtype = spec_.dtype;
  args.num_heads = spec_.num_heads;
  args.num_kv_heads = spec_.num_kv_heads;
  args.head_dim = spec_.head_dim;
  args.qkv = floats(work_.qkv);
  args.angles = floats(work_.angles, layer.rotary_table * work_.capacity * spec_.head_dim);
  args.q_norm = layer.q_norm.empty() ? nullptr : layer.q_norm.data();
  args.k_norm = layer.k_norm.empty() ? nullptr : layer.k_norm.data();
  args.eps = spec_.rms_norm_eps;
  args.query = work_.query.data();
  args.own_key = own_key;
  args.own_value = own_value;
  args.scratch = floats(work_.scratch[static_cast<size_t>(worker.index())]);
  table_.rope(args, rows, kv_heads);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    if (!rows_.stored[row]) continue;
    const PagedCache& cache = cache_of(row);
    const int64_t slot = rows_.slots[row], position = rows_.positions[row], offset = row * kv_size * element_;
    store_position(cache, spec_, index, slot, position, kv_heads, own_key + offset, cache.keys);
    store_position(cache, spec_, index, slot, position, kv_heads, own_value + offset, cache.values);
  }
}

BranchAttentionArgs Decoder::Pass::attention_args(int64_t index, int64_t row) const {
  const PagedCache& cache = cache_of(row);
  const int64_t dim = spec_.head_dim, kv_size = spec_.num_kv_heads * dim;
  const int64_t layer_size = cache.num_blocks * cache.block_size * kv_size * element_;
  BranchAttentionArgs args = {};
  args.num_heads = spec_.num_heads;
  args.num_kv_heads = spec_.num_kv_heads;
  args.head_dim = dim;
  args.block_size = cache.block_size;
  args.dtype = spec_.dtype;
  args.query = work_.query.data();
  args.query_row_stride = spec_.num_heads * dim;
  args.query_head_stride = dim;
  args.key_cache = static_cast<const char*>(cache.keys) + index * layer_size;
  args.value_cache = static_cast<const char*>(cache.values) + index * layer_size;
  args.key_block_stride = args.value_block_stride = cache.block_size * kv_size;
  args.key_head_stride = args.value_head_stride = cache.block_size * dim;
  args.key_position_stride = args.value_position_stride = dim;
  args.block_table = cache.block_table;
  args.block_table_row_stride = cache.block_table_row_stride;
  args.row_sequence = rows_.slots;
  args.row_prefix_length = rows_.positions;
  args.row_has_own = work_.has_own.data();
  args.own_key = at(work_.own_key, index * work_.capacity * kv_size, element_);
  args.own_value = at(work_.own_value, index * work_.capacity * kv_size, element_);
  args.own_key_row_stride = args.own_value_row_stride = kv_size;
  args.own_key_head_stride = args.own_value_head_stride = dim;
  args.scale = spec_.attention_scale;
  args.sliding_window = weights_.layers[static_cast<size_t>(index)].sliding_window;
  args.output = work_.attended.data();
  return args;
}

// What a worker's attention reads in a layer. Most likely that is its own share of the items, in order.
class Decoder::Pass::PrefixReader {
 public:
  PrefixReader(const Pass& pass, int64_t layer, bool in_parts, const Worker& worker)
      : pass_(pass),
        in_parts_(in_parts),
        num_items_(static_cast<int64_t>(in_parts ? pass.work_.parts.size() : pass.work_.tiles.size()) *
                   pass.spec_.num_kv_heads),
        share_(worker.share(num_items_)),
        runs_(pass.work_.runs[static_cast<size_t>(worker.index())]),
        args_{pass.attention_args(layer, 0), pass.attention_args(layer, pass.rows_.count - 1)} {
    go_to(share_);
  }

  int64_t num_items() const { return num_items_; }
  const BranchAttentionArgs& args(int64_t row) const { return args_[row >= pass_.rows_.first_adapted]; }

  // The stream at the beginning of a range of items.
  PrefixStream* at(RowRange items) {
    const bool mine = items.begin >= share_.begin && items.begin < share_.end;
    if (items.begin != next_) go_to({items.begin, mine ? share_.end : items.end});
    next_ = items.end;
    return &stream_;
  }

 private:
  void go_to(RowRange items) {
    runs_.clear();
    for (int64_t item = items.begin; item < items.end; ++item) runs_.push_back(run(item));
    start(&stream_, runs_.data(), runs_.data() + runs_.size());
    next_ = items.begin;
  }

  PrefixRun run(int64_t item) const {
    const int64_t heads = pass_.spec_.num_kv_heads, index = item / heads;
    const AttentionPart part =
        in_parts_ ? pass_.work_.parts[static_cast<size_t>(index)] : AttentionPart{index, 0, 1, 0};
    const RowRange rows = pass_.work_.tiles[static_cast<size_t>(part.tile)];
    PrefixRun run = {&args(rows.begin), rows.begin, item % heads, first_visible(args(rows.begin), rows.begin),
                     pass_.rows_.positions[rows.end - 1]};
    if (in_parts_) {
      run.begin = std::max(run.begin, part.part * kAttentionPart);
      run.end = std::min(run.end, (part.part + 1) * kAttentionPart);
    }
    return run;
  }

  const Pass& pass_;
  bool in_parts_;
  int64_t num_items_;
  RowRange share_;
  std::vector<PrefixRun>& runs_;
  BranchAttentionArgs args_[2];  // of the LLM's cache and of the adapted one
  PrefixStream stream_;
  int64_t next_ = 0;
};

// Rotary positions, cache writes and attention.
void Decoder::Pass::attend(int64_t index, const AdaptedLinear* next, Worker& worker) const {
  // With a window of one position rows see nothing that touches.
  const bool in_parts = !work_.parts.empty() && weights_.layers[static_cast<size_t>(index)].sliding_window != 1;
  const bool at_once = one_tile_per_slot_ && !in_parts;
  PrefixReader reader(*this, index, in_parts, worker);
  if (!at_once) {
    worker.each(rows_.count, [&](RowRange rows) { rope_and_store(index, rows, {0, spec_.num_kv_heads}, worker); });
  }
  if (in_parts) return attend_in_parts(reader, next, worker);
  void* scratch = work_.scratch[static_cast<size_t>(worker.index())].data();
  const auto work = [&](RowRange items) {
    PrefixStream* ahead = reader.at(items);
    for (int64_t item = items.begin; item < items.end; ++item) {
      const int64_t kv_head = item % spec_.num_kv_heads;
      const RowRange tile = work_.tiles[static_cast<size_t>(item / spec_.num_kv_heads)];
      if (at_once) rope_and_store(index, tile, {kv_head, kv_head + 1}, worker);
      table_.branch_attention(reader.args(tile.begin), tile, {kv_head, kv_head + 1}, ahead, scratch);
    }
  };
  worker.each(reader.num_items(), work, Prefetch(next, has_adapted(), worker));
}

// Whoever finishes the last part of a tile's head merges them, always in the same order.
void Decoder::Pass::attend_in_parts(PrefixReader& reader, const AdaptedLinear* next, Worker& worker) const {
  void* scratch = work_.scratch[static_cast<size_t>(worker.index())].data();
  const int64_t heads = spec_.num_kv_heads, state_size = table_.attention_state_size(reader.args(0));
  const auto work = [&](RowRange items) {
    PrefixStream* ahead = reader.at(items);
    for (int64_t item = items.begin; item < items.end; ++item) {
      const AttentionPart& part = work_.parts[static_cast<size_t>(item / heads)];
      const int64_t kv_head = item % heads;
      const RowRange tile = work_.tiles[static_cast<size_t>(part.tile)];
      const BranchAttentionArgs& args = reader.args(tile.begin);
      float* states = work_.part_states.data() + (part.first_state * heads + kv_head * part.num_parts) * state_size;
      table_.attend_part(args, tile, kv_head, part.part, states + part.part * state_size, ahead, scratch);
      const int64_t finished = 1 + work_.finished_parts[static_cast<size_t>(part.tile * heads + kv_head)].fetch_add(1);
      if (finished % part.num_parts == 0) {  // the counters go on from layer to layer
        table_.merge_parts(args, tile, kv_head, part.num_parts, states, scratch);
      }
    }
  };
  worker.each(reader.num_items(), work, Prefetch(next, has_adapted(), worker));
}

bool Decoder::Pass::head_reads(int64_t layer) const {
  return head_ != nullptr && std::find(head_->layers.begin(), head_->layers.end(), layer) != head_->layers.end();
}

// Keeps the hidden state of an inner layer that the head reads.
void Decoder::Pass::capture(int64_t layer, int64_t row) const {
  const int64_t size = spec_.hidden_size;
  for (size_t i = 0; i < head_->layers.size(); ++i) {
    if (head_->layers[i] != layer) continue;
    std::memcpy(floats(work_.features, row * work_.features_stride + static_cast<int64_t>(i) * size),
                floats(work_.residual, row * size), static_cast<size_t>(size) * 4);
  }
}

// Puts the final hidden state where the head reads it, as float32.
void Decoder::Pass::capture_final(int64_t row) const {
  const int64_t size = spec_.hidden_size;
  const char* hidden = at(work_.normed, row * size, element_);
  for (size_t i = 0; i < head_->layers.size(); ++i) {
    if (head_->layers[i] != ScoreHead::kFinalLayer) continue;
    float* feature = floats(work_.features, row * work_.features_stride + static_cast<int64_t>(i) * size);
    for (int64_t j = 0; j < size; ++j) {
      feature[j] = spec_.dtype == DType::kFloat32 ? reinterpret_cast<const float*>(hidden)[j]
                                                  : to_float(reinterpret_cast<const BFloat16*>(hidden)[j]);
    }
  }
}

void Decoder::Pass::score(int64_t row) const {
  capture_final(row);
  const float* inputs = floats(work_.features, row * work_.features_stride);
  const int64_t num_features = spec_.hidden_size * static_cast<int64_t>(head_->layers.size());
  if (!head_->dense_bias.empty()) {
    float* units = floats(work_.features, row * work_.features_stride + num_features);
    for (size_t unit = 0; unit < head_->dense_bias.size(); ++unit) {
      const float* weight = head_->dense_weight.data() + static_cast<int64_t>(unit) * num_features;
      const float x = table_.dot(weight, inputs, num_features) + head_->dense_bias[unit];
      units[unit] = x / (1.0f + std::exp(-x));
    }
    inputs = units;
  }
  const int64_t num_inputs = static_cast<int64_t>(head_->score_weight.size());
  scores_[row] = table_.dot(head_->score_weight.data(), inputs, num_inputs) + head_->score_bias;
}

Decoder::Decoder(DecoderWeights weights, Isa isa)
    : weights_(std::move(weights)), isa_(isa), workspace_(new Workspace(weights_)) {}

Decoder::~Decoder() = default;

void Decoder::forward(const PagedCache& cache, const DecoderRows& rows, const ScoreHead* head, float* scores,
                      int num_threads) {
  if (rows.count == 0) return;
  int64_t head_features = 0;
  if (head != nullptr) {
    head_features =
        spec().hidden_size * static_cast<int64_t>(head->layers.size()) + static_cast<int64_t>(head->dense_bias.size());
  }
  workspace_->reserve(weights_, rows.count, head_features);
  workspace_->slots.assign(rows.slots, rows.slots + rows.count);
  workspace_->positions.assign(rows.positions, rows.positions + rows.count);
  workspace_->stored.assign(rows.stored, rows.stored + rows.count);
  Pass pass(*this, cache, rows, head, scores);
  workspace_->reserve_threads(weights_, num_threads, pass.scratch_bytes());
  workspace_->reserve_linear(weights_, kernels(isa_), rows.count, num_threads);
  pass.plan(num_threads);
  const int64_t num_phases = 2 + kPhasesPerLayer * static_cast<int64_t>(weights_.layers.size());
  run_parallel(num_threads, num_phases, [&](Worker& worker) { pass.run(worker); });
}

void Decoder::keep_row(const PagedCache& cache, int64_t row) const {
  const int64_t slot = workspace_->slots[static_cast<size_t>(row)];
  const int64_t position = workspace_->positions[static_cast<size_t>(row)];
  const int64_t element = size_of(spec().dtype), hidden_bytes = spec().hidden_size * element;
  std::memcpy(static_cast<char*>(cache.hidden_states) + slot * hidden_bytes, at(workspace_->normed, row, hidden_bytes),
              static_cast<size_t>(hidden_bytes));
  if (workspace_->stored[static_cast<size_t>(row)]) return;
  const int64_t kv_bytes = spec().num_kv_heads * spec().head_dim * element;
  for (int64_t layer = 0; layer < static_cast<int64_t>(weights_.layers.size()); ++layer) {
    const int64_t index = layer * workspace_->capacity + row;
    const RowRange heads = {0, spec().num_kv_heads};
    store_position(cache, spec(), layer, slot, position, heads, at(workspace_->own_key, index, kv_bytes), cache.keys);
    store_position(cache, spec(), layer, slot, position, heads, at(workspace_->own_value, index, kv_bytes),
                   cache.values);
  }
}

void Decoder::select(const PagedCache& cache, const int32_t* slots, int64_t count, const SelectCandidatesArgs& args,
                     float* const* logits, int num_threads) {
  Workspace& work = *workspace_;
  const PackedLinear& lm_head = *weights_.lm_head;
  const int64_t hidden_bytes = spec().hidden_size * size_of(spec().dtype);
  const int64_t capacity = std::min(args.max_candidates, args.vocab_size) + 1;
  work.reserve_selection(weights_, count);
  work.clear_rankings(num_threads, count, capacity);
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(at(work.last, i, hidden_bytes), static_cast<const char*>(cache.hidden_states) + slots[i] * hidden_bytes,
                static_cast<size_t>(hidden_bytes));
  }
  const SelectFold fold = {
      &args, capacity, work.rankings.data(), floats(work.panel_max), floats(work.panel_sum), lm_head.num_panels(),
      logits};
  LinearArgs linear = {};
  linear.dtype = spec().dtype;
  linear.rows = count;
  linear.out_features = lm_head.out_features();
  linear.bias = lm_head.bias();
  linear.epilogue = Epilogue::kSelect;
  linear.select = &fold;
  const KernelTable& table = kernels(isa_);
  work.reserve_linear(weights_, table, count, num_threads);
  run_parallel(num_threads, 2, [&](Worker& worker) {
    const size_t index = static_cast<size_t>(worker.index());
    const LinearInput last = {work.last.data(), spec().hidden_size};
    LinearArgs mine = linear;
    mine.weights = {lm_head.panels(),
                    table.operands(spec().dtype, last, count, spec().hidden_size, work.operands[index].data())};
    mine.workspace = work.linear[index].data();
    mine.rankings = fold.rankings + worker.index() * count;
    worker.each(lm_head.num_panels(), [&](RowRange panels) { table.linear(mine, panels); });
    worker.each(count, [&](RowRange rows) { table.finish_selection(fold, num_threads, count, rows); });
  });
}

}  // namespace llm2_fast
