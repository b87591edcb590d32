// Attention of rows to the paged prefix of their sequence and to themselves, online softmax in float32.
//
// Positions are taken in chunks of kChunk that begin at multiples of kChunk, then the own key as a chunk of its own. In
// a chunk a position has a fixed lane, a dot product is one chain over head_dim, and the weighted values are one chain
// over the positions. The chunks of each kAttentionPart positions have a softmax state of their own, and the states are
// merged in order, so that threads can share a long prefix. So the order of every sum depends on absolute positions
// only, and a row's result is bitwise the same whatever rows and threads it is computed with.
//
// A chunk's keys are widened and transposed once, for all query heads of all rows of a sequence that see it.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "vector_math.h"

namespace llm2_fast {
namespace LLM2_FAST_TIER {

constexpr int64_t kChunk = 64;
static_assert(kAttentionPart % kChunk == 0, "a part consists of whole chunks");
constexpr int kBlockVecs = 4;  // vectors per head that are accumulated in registers

static int64_t padded_head_dim(const BranchAttentionArgs& args) {
  return (args.head_dim + kLanes - 1) / kLanes * kLanes;
}

// Positions [begin, end), of a prefix or of a chunk.
struct Span {
  int64_t begin;
  int64_t end;
};

// Softmax state per query head of a tile.
struct AttentionState {
  float* accumulated;  // [kAttentionTileRows * group, padded head_dim], weighted values relative to `max`
  float* max;          // [kAttentionTileRows * group]
  float* sum;          // [kAttentionTileRows * group], of weights relative to `max`
};

// Consecutive rows of one sequence with one key/value head: their queries and the chunk they attend to. Query heads are
// numbered row by row.
template <typename T>
struct AttentionTile {
  const BranchAttentionArgs& args;
  RowRange rows;
  Span visible;  // prefix positions that some row sees
  int64_t kv_head;
  int64_t group;  // query heads per key/value head

  float* queries;           // [kAttentionTileRows * group, head_dim]
  AttentionState total;     // of the parts merged so far
  AttentionState part;      // of the current part
  float* keys;              // [head_dim, kChunk], of the current chunk
  float* weights;           // [kHeadsAtOnce, kChunk]
  const T* values[kChunk];  // of the current chunk
};

static int64_t attention_state_size(const BranchAttentionArgs& args) {
  return kAttentionTileRows * (args.num_heads / args.num_kv_heads) * (padded_head_dim(args) + 2);
}

static int64_t branch_attention_workspace(const BranchAttentionArgs& args) {
  const int64_t queries = kAttentionTileRows * (args.num_heads / args.num_kv_heads);
  const int64_t floats =
      queries * args.head_dim + 2 * attention_state_size(args) + (args.head_dim + kHeadsAtOnce) * kChunk;
  return floats * static_cast<int64_t>(sizeof(float));
}

static AttentionState state_in(const BranchAttentionArgs& args, float* floats) {
  const int64_t queries = kAttentionTileRows * (args.num_heads / args.num_kv_heads);
  float* max = floats + queries * padded_head_dim(args);
  return {floats, max, max + queries};
}

template <typename T>
static AttentionTile<T> make_tile(const BranchAttentionArgs& args, void* workspace) {
  const int64_t group = args.num_heads / args.num_kv_heads;
  float* floats = static_cast<float*>(workspace);
  const auto take = [&](int64_t count) {
    float* taken = floats;
    floats += count;
    return taken;
  };
  return {args,
          {0, 0},
          {0, 0},
          0,
          group,
          take(kAttentionTileRows * group * args.head_dim),
          state_in(args, take(attention_state_size(args))),
          state_in(args, take(attention_state_size(args))),
          take(args.head_dim * kChunk),
          take(kHeadsAtOnce * kChunk),
          {}};
}

template <typename T>
static void transpose_keys(const T* const* keys, Span span, int64_t head_dim, float* transposed) {
  for (int64_t first = span.begin / kLanes * kLanes; first < span.end; first += kLanes) {
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      const int64_t width = head_dim - d < kLanes ? head_dim - d : kLanes;
      Vec block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const int64_t t = first + i;
        if (t < span.begin || t >= span.end) {
          block[i] = set1(0.0f);
        } else {
          block[i] = width == kLanes ? load(keys[t] + d) : load_partial(keys[t] + d, static_cast<int>(width), 0.0f);
        }
      }
      transpose(block);
      for (int64_t i = 0; i < width; ++i) store(transposed + (d + i) * kChunk + first, block[i]);
    }
  }
}

// scores[h][t] = scale * (query h . key t) for kVecs vectors of positions. `keys` and `scores` point at the first.
template <int kHeads, int kVecs>
static void dot_products(const float* queries, const float* keys, int64_t head_dim, float scale, float* scores) {
  Vec dot[kHeads][kVecs];
  for (int h = 0; h < kHeads; ++h) {
    for (int v = 0; v < kVecs; ++v) dot[h][v] = set1(0.0f);
  }
  for (int64_t d = 0; d < head_dim; ++d) {
    Vec key[kVecs];
    for (int v = 0; v < kVecs; ++v) key[v] = load(keys + d * kChunk + v * kLanes);
    for (int h = 0; h < kHeads; ++h) {
      const Vec query = set1(queries[h * head_dim + d]);
      for (int v = 0; v < kVecs; ++v) dot[h][v] = fma(query, key[v], dot[h][v]);
    }
  }
  for (int h = 0; h < kHeads; ++h) {
    for (int v = 0; v < kVecs; ++v) store(scores + h * kChunk + v * kLanes, mul(dot[h][v], set1(scale)));
  }
}

// Turns the scores of one head into weights relative to the new maximum, and updates maximum and sum. Returns the
// factor for what was accumulated before.
static float softmax_update(float* scores, Span span, float* running_max, float* running_sum) {
  const int64_t first = span.begin / kLanes * kLanes, last = (span.end + kLanes - 1) / kLanes * kLanes;
  for (int64_t t = first; t < span.begin; ++t) scores[t] = -kInfinity;
  for (int64_t t = span.end; t < last; ++t) scores[t] = -kInfinity;

  const float largest = maximum(scores + first, last - first);
  const float new_max = largest > *running_max ? largest : *running_max;
  const float base = new_max == -kInfinity ? 0.0f : new_max;  // every score so far is -inf: weights 0, not NaN
  Vec sum = set1(0.0f);
  for (int64_t t = first; t < last; t += kLanes) {
    const Vec weight = exp_nonpositive(sub(load(scores + t), set1(base)));
    store(scores + t, weight);
    sum = add(sum, weight);
  }
  const float factor = exp_nonpositive(*running_max - base);
  *running_max = new_max;
  *running_sum = *running_sum * factor + sum_lanes(sum);
  return factor;
}

// accumulated[h][d] = accumulated[h][d] * factor[h] + sum over t of weights[h][t] * values[t][d] for kVecs vectors of
// d, of which `width` elements exist.
template <typename T, int kHeads, int kVecs>
static void add_values(const T* const* values, Span span, int64_t d, int64_t width, const float* weights,
                       const float* factor, float* accumulated, int64_t stride) {
  Vec total[kHeads][kVecs];
  for (int h = 0; h < kHeads; ++h) {
    for (int v = 0; v < kVecs; ++v) {
      total[h][v] = mul(load(accumulated + h * stride + d + v * kLanes), set1(factor[h]));
    }
  }
  for (int64_t t = span.begin; t < span.end; ++t) {
    Vec value[kVecs];
    if (width == kVecs * kLanes) {
      for (int v = 0; v < kVecs; ++v) value[v] = load(values[t] + d + v * kLanes);
    } else {
      value[0] = load_partial(values[t] + d, static_cast<int>(width), 0.0f);  // only with kVecs = 1
    }
    for (int h = 0; h < kHeads; ++h) {
      const Vec weight = set1(weights[h * kChunk + t]);
      for (int v = 0; v < kVecs; ++v) total[h][v] = fma(weight, value[v], total[h][v]);
    }
  }
  for (int h = 0; h < kHeads; ++h) {
    for (int v = 0; v < kVecs; ++v) store(accumulated + h * stride + d + v * kLanes, total[h][v]);
  }
}

// kHeads query heads from `query` on attend to `span` of the current chunk.
template <typename T, int kHeads>
static void attend_heads(const AttentionTile<T>& tile, const AttentionState& state, int64_t query, Span span) {
  const int64_t head_dim = tile.args.head_dim;
  const float* queries = tile.queries + query * head_dim;
  int64_t t = span.begin / kLanes * kLanes;
  for (; t + kBlockVecs * kLanes <= kChunk && t < span.end; t += kBlockVecs * kLanes) {
    dot_products<kHeads, kBlockVecs>(queries, tile.keys + t, head_dim, tile.args.scale, tile.weights + t);
  }
  for (; t < span.end; t += kLanes) {
    dot_products<kHeads, 1>(queries, tile.keys + t, head_dim, tile.args.scale, tile.weights + t);
  }

  float factor[kHeads];
  for (int h = 0; h < kHeads; ++h) {
    factor[h] = softmax_update(tile.weights + h * kChunk, span, state.max + query + h, state.sum + query + h);
  }

  const int64_t stride = padded_head_dim(tile.args);
  float* accumulated = state.accumulated + query * stride;
  int64_t d = 0;
  for (constexpr int64_t kStep = kBlockVecs * kLanes; d + kStep <= head_dim; d += kStep) {
    add_values<T, kHeads, kBlockVecs>(tile.values, span, d, kStep, tile.weights, factor, accumulated, stride);
  }
  for (; d < head_dim; d += kLanes) {
    const int64_t width = head_dim - d < kLanes ? head_dim - d : kLanes;
    add_values<T, kHeads, 1>(tile.values, span, d, width, tile.weights, factor, accumulated, stride);
  }
}

// `heads` query heads from `query` on, as many at once as fit the registers.
template <typename T, int kHeads = kHeadsAtOnce>
static void attend(const AttentionTile<T>& tile, const AttentionState& state, int64_t query, int64_t heads, Span span) {
  for (; heads >= kHeads; heads -= kHeads, query += kHeads) attend_heads<T, kHeads>(tile, state, query, span);
  if constexpr (kHeads > 1) {
    if (heads > 0) attend<T, kHeads - 1>(tile, state, query, heads, span);
  }
}

template <typename T>
static void load_queries(AttentionTile<T>& tile) {
  const BranchAttentionArgs& args = tile.args;
  const int64_t heads = (tile.rows.end - tile.rows.begin) * tile.group;
  for (int64_t i = 0; i < heads; ++i) {
    const T* query = static_cast<const T*>(args.query) + (tile.rows.begin + i / tile.group) * args.query_row_stride +
                     (tile.kv_head * tile.group + i % tile.group) * args.query_head_stride;
    for (int64_t d = 0; d < args.head_dim; ++d) tile.queries[i * args.head_dim + d] = to_float(query[d]);
  }
}

// The state of having seen nothing.
template <typename T>
static void clear(const AttentionTile<T>& tile, const AttentionState& state) {
  const int64_t heads = (tile.rows.end - tile.rows.begin) * tile.group;
  for (int64_t i = 0; i < heads; ++i) {
    state.max[i] = -kInfinity;
    state.sum[i] = 0.0f;
  }
  const int64_t size = heads * padded_head_dim(tile.args);
  for (int64_t i = 0; i < size; ++i) state.accumulated[i] = 0.0f;
}

// Makes the positions `span` of the chunk that begins at `origin` the current chunk.
template <typename T>
static void load_prefix_chunk(AttentionTile<T>& tile, int64_t origin, Span span) {
  const BranchAttentionArgs& args = tile.args;
  const int32_t* blocks = args.block_table + args.row_sequence[tile.rows.begin] * args.block_table_row_stride;
  const T* keys[kChunk];
  for (int64_t t = span.begin; t < span.end;) {
    const int64_t block = (origin + t) / args.block_size;
    const int64_t id = blocks[block];
    const T* key =
        static_cast<const T*>(args.key_cache) + id * args.key_block_stride + tile.kv_head * args.key_head_stride;
    const T* value =
        static_cast<const T*>(args.value_cache) + id * args.value_block_stride + tile.kv_head * args.value_head_stride;
    const int64_t block_end = (block + 1) * args.block_size - origin;
    for (const int64_t end = block_end < span.end ? block_end : span.end; t < end; ++t) {
      const int64_t offset = origin + t - block * args.block_size;
      keys[t] = key + offset * args.key_position_stride;
      tile.values[t] = value + offset * args.value_position_stride;
    }
  }
  transpose_keys(keys, span, args.head_dim, tile.keys);
}

// Makes the own key and value of `row` the current chunk.
template <typename T>
static void load_own_chunk(AttentionTile<T>& tile, int64_t row) {
  const BranchAttentionArgs& args = tile.args;
  const T* key =
      static_cast<const T*>(args.own_key) + row * args.own_key_row_stride + tile.kv_head * args.own_key_head_stride;
  tile.values[0] = static_cast<const T*>(args.own_value) + row * args.own_value_row_stride +
                   tile.kv_head * args.own_value_head_stride;
  transpose_keys(&key, {0, 1}, args.head_dim, tile.keys);
}

// The positions that a row sees in the part that begins at `origin`, relative to it.
static Span visible_within(const BranchAttentionArgs& args, int64_t row, int64_t origin, int64_t size) {
  const int64_t begin = first_visible(args, row) - origin, end = args.row_prefix_length[row] - origin;
  return {begin > 0 ? begin : 0, end < size ? end : size};
}

// Rows attend to what they see of a part of the prefix.
template <typename T>
static void attend_prefix_part(AttentionTile<T>& tile, int64_t part, const AttentionState& state) {
  const BranchAttentionArgs& args = tile.args;
  const int64_t part_begin = part * kAttentionPart, part_end = part_begin + kAttentionPart;
  const int64_t begin = tile.visible.begin > part_begin ? tile.visible.begin : part_begin;
  const int64_t end = tile.visible.end < part_end ? tile.visible.end : part_end;
  for (int64_t origin = begin / kChunk * kChunk; origin < end; origin += kChunk) {
    load_prefix_chunk(tile, origin,
                      {begin > origin ? begin - origin : 0, end < origin + kChunk ? end - origin : kChunk});
    for (int64_t row = tile.rows.begin; row < tile.rows.end; ++row) {
      const Span visible = visible_within(args, row, origin, kChunk);
      if (visible.begin < visible.end) attend(tile, state, (row - tile.rows.begin) * tile.group, tile.group, visible);
    }
  }
}

// Adds a part's state to the total, for the rows that see something of the part.
template <typename T>
static void merge_part(const AttentionTile<T>& tile, int64_t part, const AttentionState& state) {
  const int64_t stride = padded_head_dim(tile.args);
  for (int64_t row = tile.rows.begin; row < tile.rows.end; ++row) {
    const Span visible = visible_within(tile.args, row, part * kAttentionPart, kAttentionPart);
    if (visible.begin >= visible.end) continue;
    for (int64_t i = (row - tile.rows.begin) * tile.group; i < (row - tile.rows.begin + 1) * tile.group; ++i) {
      const float max = state.max[i] > tile.total.max[i] ? state.max[i] : tile.total.max[i];
      const float base = max == -kInfinity ? 0.0f : max;
      const float before = exp_nonpositive(tile.total.max[i] - base), factor = exp_nonpositive(state.max[i] - base);
      float* total = tile.total.accumulated + i * stride;
      for (int64_t d = 0; d < stride; d += kLanes) {
        const Vec added = mul(load(state.accumulated + i * stride + d), set1(factor));
        store(total + d, fma(load(total + d), set1(before), added));
      }
      tile.total.sum[i] = tile.total.sum[i] * before + state.sum[i] * factor;
      tile.total.max[i] = max;
    }
  }
}

template <typename T>
static void attend_own(AttentionTile<T>& tile) {
  for (int64_t row = tile.rows.begin; row < tile.rows.end; ++row) {
    if (!tile.args.row_has_own[row]) continue;
    load_own_chunk(tile, row);
    attend(tile, tile.total, (row - tile.rows.begin) * tile.group, tile.group, {0, 1});
  }
}

template <typename T>
static void write_output(const AttentionTile<T>& tile) {
  const BranchAttentionArgs& args = tile.args;
  for (int64_t row = tile.rows.begin; row < tile.rows.end; ++row) {
    const bool sees_nothing = !args.row_has_own[row] && first_visible(args, row) >= args.row_prefix_length[row];
    for (int64_t head = 0; head < tile.group; ++head) {
      const int64_t i = (row - tile.rows.begin) * tile.group + head;
      const float* accumulated = tile.total.accumulated + i * padded_head_dim(args);
      T* output =
          static_cast<T*>(args.output) + (row * args.num_heads + tile.kv_head * tile.group + head) * args.head_dim;
      for (int64_t d = 0; d < args.head_dim; ++d) {
        from_float(sees_nothing ? 0.0f : accumulated[d] / tile.total.sum[i], output + d);
      }
    }
  }
}

// Fills the tile with rows from `begin` on. A row whose positions do not touch those of the rows before it begins a
// tile of its own: blocks that hold positions nobody sees may be absent and are never read.
template <typename T>
static void choose_rows(AttentionTile<T>& tile, int64_t begin, int64_t end) {
  const BranchAttentionArgs& args = tile.args;
  tile.rows = {begin, begin + 1};
  tile.visible = {first_visible(args, begin), args.row_prefix_length[begin]};
  for (int64_t row = begin + 1; row < end && row - begin < kAttentionTileRows; ++row) {
    const Span visible = {first_visible(args, row), args.row_prefix_length[row]};
    if (args.row_sequence[row] != args.row_sequence[begin]) break;
    if (visible.begin > tile.visible.end || visible.end < tile.visible.begin) break;
    if (visible.begin < tile.visible.begin) tile.visible.begin = visible.begin;
    if (visible.end > tile.visible.end) tile.visible.end = visible.end;
    tile.rows.end = row + 1;
  }
}

template <typename T>
static void attend_rows(const BranchAttentionArgs& args, RowRange rows, RowRange kv_heads, void* workspace) {
  AttentionTile<T> tile = make_tile<T>(args, workspace);
  for (int64_t begin = rows.begin; begin < rows.end; begin = tile.rows.end) {
    choose_rows(tile, begin, rows.end);
    for (tile.kv_head = kv_heads.begin; tile.kv_head < kv_heads.end; ++tile.kv_head) {
      load_queries(tile);
      clear(tile, tile.total);
      for (int64_t part = tile.visible.begin / kAttentionPart; part * kAttentionPart < tile.visible.end; ++part) {
        clear(tile, tile.part);
        attend_prefix_part(tile, part, tile.part);
        merge_part(tile, part, tile.part);
      }
      attend_own(tile);
      write_output(tile);
    }
  }
}

static void branch_attention(const BranchAttentionArgs& args, RowRange rows, RowRange kv_heads, void* workspace) {
  args.dtype == DType::kFloat32 ? attend_rows<float>(args, rows, kv_heads, workspace)
                                : attend_rows<BFloat16>(args, rows, kv_heads, workspace);
}

template <typename T>
static AttentionTile<T> tile_of(const BranchAttentionArgs& args, RowRange rows, int64_t kv_head, void* workspace) {
  AttentionTile<T> tile = make_tile<T>(args, workspace);
  choose_rows(tile, rows.begin, rows.end);
  tile.kv_head = kv_head;
  load_queries(tile);
  return tile;
}

template <typename T>
static void attend_part_of(const BranchAttentionArgs& args, RowRange rows, int64_t kv_head, int64_t part, float* floats,
                           void* workspace) {
  AttentionTile<T> tile = tile_of<T>(args, rows, kv_head, workspace);
  const AttentionState state = state_in(args, floats);
  clear(tile, state);
  attend_prefix_part(tile, part, state);
}

static void attend_part(const BranchAttentionArgs& args, RowRange rows, int64_t kv_head, int64_t part, float* state,
                        void* workspace) {
  args.dtype == DType::kFloat32 ? attend_part_of<float>(args, rows, kv_head, part, state, workspace)
                                : attend_part_of<BFloat16>(args, rows, kv_head, part, state, workspace);
}

template <typename T>
static void merge_parts_of(const BranchAttentionArgs& args, RowRange rows, int64_t kv_head, int64_t num_parts,
                           float* states, void* workspace) {
  AttentionTile<T> tile = tile_of<T>(args, rows, kv_head, workspace);
  clear(tile, tile.total);
  for (int64_t part = 0; part < num_parts; ++part) {
    merge_part(tile, part, state_in(args, states + part * attention_state_size(args)));
  }
  attend_own(tile);
  write_output(tile);
}

static void merge_parts(const BranchAttentionArgs& args, RowRange rows, int64_t kv_head, int64_t num_parts,
                        float* states, void* workspace) {
  args.dtype == DType::kFloat32 ? merge_parts_of<float>(args, rows, kv_head, num_parts, states, workspace)
                                : merge_parts_of<BFloat16>(args, rows, kv_head, num_parts, states, workspace);
}

}  // namespace LLM2_FAST_TIER
}  // namespace llm2_fast
