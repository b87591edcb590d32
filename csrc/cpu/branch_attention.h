// Attention of rows to the paged prefix of their sequence and to themselves, online softmax in float32.
//
// Positions are taken in chunks of kChunk that begin at multiples of kChunk, then the own key as a chunk of its own. In
// a chunk a position has a fixed lane, a dot product is one chain over head_dim, and the weighted values are one chain
// over the positions. The chunks of each kAttentionPart positions have a softmax state of their own, and the states are
// merged in order, so that threads can share a long prefix. So the order of every sum depends on absolute positions
// only, and a row's result is bitwise the same whatever rows and threads it is computed with.
//
// A chunk's keys are transposed once, for all query heads of all rows of a sequence that see it.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "multiply_add.h"
#include "prefix_stream.h"
#include "vector_math.h"

namespace llm2_fast {
namespace LLM2_FAST_TIER {

constexpr int64_t kChunk = 64;
static_assert(kAttentionPart % kChunk == 0, "a part consists of whole chunks");
constexpr int kBlockVecs = 4;  // vectors per head that are accumulated in registers

// For so many heads at once: twice as many for few, so that enough multiply-adds wait for no other.
constexpr int vecs_at_once(int heads) {
  return 2 * heads <= kHeadsAtOnce ? 2 * kBlockVecs : kBlockVecs;
}

// Transposed keys are stored as weights of a linear layer whose output features are positions.
template <typename T>
using KeyStep = StepOf<T, T>;

// A multiple of the elements that a vector of memory holds.
static int64_t padded_head_dim(const BranchAttentionArgs& args) {
  constexpr int64_t kElements = kLanes * sizeof(float) / sizeof(BFloat16);
  return (args.head_dim + kElements - 1) / kElements * kElements;
}

// Positions [begin, end), of a prefix or of a chunk.
struct Span {
  int64_t begin;
  int64_t end;
};

// Where some positions of a prefix lie that are in one chunk.
template <typename T>
struct Chunk {
  int64_t origin;         // position of its beginning, a multiple of kChunk
  Span span;              // relative to it
  const T* keys[kChunk];  // of `span`
  const T* values[kChunk];
  const void* later_keys[kChunk];  // to be asked for meanwhile
  const void* later_values[kChunk];
};

// Softmax state per query head of a tile.
struct AttentionState {
  float* accumulated;  // [kAttentionTileRows * group, padded head_dim], weighted values relative to `max`, see
                       // `accumulated_at`
  float* max;          // [kAttentionTileRows * group]
  float* sum;          // [kAttentionTileRows * group], of weights relative to `max`
};

// Consecutive rows of one sequence with one key/value head: their queries and the chunk they attend to. Query heads are
// numbered row by row.
template <typename T>
struct AttentionTile {
  using Element = typename MultiplyAdd<T>::Element;

  const BranchAttentionArgs& args;
  RowRange rows;
  Span visible;  // prefix positions that some row sees
  int64_t kv_head;
  int64_t group;  // query heads per key/value head

  Element* queries;      // [kAttentionTileRows * group, padded head_dim], zeros in the padding
  AttentionState total;  // of the parts merged so far
  AttentionState part;   // of the current part
  T* keys;               // [padded head_dim / kDepth, kChunk, kDepth], of the current chunk
  Element* own_key;      // [padded head_dim], of the current row
  float* weights;        // [kHeadsAtOnce, kChunk]
  bool own;              // the current chunk is a row's own position
};

static int64_t attention_state_size(const BranchAttentionArgs& args) {
  return kAttentionTileRows * (args.num_heads / args.num_kv_heads) * (padded_head_dim(args) + 2);
}

static int64_t branch_attention_workspace(const BranchAttentionArgs& args) {
  const int64_t queries = kAttentionTileRows * (args.num_heads / args.num_kv_heads);
  const int64_t dim = padded_head_dim(args);
  const int64_t floats = queries * dim + 2 * attention_state_size(args) + (dim + kHeadsAtOnce) * kChunk + dim;
  return floats * static_cast<int64_t>(sizeof(float));
}

static AttentionState state_in(const BranchAttentionArgs& args, float* floats) {
  const int64_t queries = kAttentionTileRows * (args.num_heads / args.num_kv_heads);
  float* max = floats + queries * padded_head_dim(args);
  return {floats, max, max + queries};
}

template <typename T>
static AttentionTile<T> make_tile(const BranchAttentionArgs& args, void* workspace) {
  using Element = typename AttentionTile<T>::Element;
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
          reinterpret_cast<Element*>(take(kAttentionTileRows * group * padded_head_dim(args))),
          state_in(args, take(attention_state_size(args))),
          state_in(args, take(attention_state_size(args))),
          reinterpret_cast<T*>(take(padded_head_dim(args) * kChunk)),
          reinterpret_cast<Element*>(take(padded_head_dim(args))),
          take(kHeadsAtOnce * kChunk),
          false};
}

// Copies the vector of one head, padded with zeros.
template <typename T>
static void copy_head(const BranchAttentionArgs& args, const T* head, typename MultiplyAdd<T>::Element* output) {
  to_elements(head, args.head_dim, output);
  for (int64_t d = args.head_dim; d < padded_head_dim(args); ++d) from_float(0.0f, output + d);
}

// A vector of memory at p, of which `size` elements exist; the others are zero.
template <typename T>
static inline Vec load_memory(const T* p, int64_t size) {
  Vec v = set1(0.0f);
  if (size * sizeof(T) == sizeof(v)) {
    __builtin_memcpy(&v, p, sizeof(v));
  } else {
    __builtin_memcpy(&v, p, static_cast<size_t>(size) * sizeof(T));
  }
  return v;
}

// Transposes the keys of a chunk, and asks for those that come later.
template <typename T>
static void transpose_keys(const T* const* keys, const void* const* later, Span span, int64_t head_dim, T* transposed) {
  constexpr int64_t kDepth = KeyStep<T>::kDepth, kElements = kLanes * kDepth;
  static_assert(kDepth * sizeof(T) == sizeof(float), "what is transposed are words");
  for (int64_t first = span.begin / kLanes * kLanes; first < span.end; first += kLanes) {
    const bool whole = first >= span.begin && first + kLanes <= span.end;
    const int64_t begin = first > span.begin ? first : span.begin;
    const int64_t end = first + kLanes < span.end ? first + kLanes : span.end;
    for (int64_t d = 0; d < head_dim; d += kElements) {
      if (d * int64_t{sizeof(T)} % kCacheLine == 0) {
        for (int64_t t = begin; t < end; ++t) prefetch(static_cast<const T*>(later[t]) + d);
      }
      const int64_t width = head_dim - d < kElements ? head_dim - d : kElements;
      Vec block[kLanes];
      if (whole && width == kElements) {
        for (int i = 0; i < kLanes; ++i) block[i] = load_memory(keys[first + i] + d, kElements);
      } else {
        for (int i = 0; i < kLanes; ++i) {
          const int64_t t = first + i;
          block[i] = t < begin || t >= end ? set1(0.0f) : load_memory(keys[t] + d, width);
        }
      }
      transpose(block);
      for (int64_t i = 0; i * kDepth < width; ++i) {
        store(reinterpret_cast<float*>(transposed + (d + i * kDepth) * kChunk + first * kDepth), block[i]);
      }
    }
  }
}

// scores[h][t] = scale * (query h . key t) for kVecs vectors of positions. `keys` and `scores` point at the first.
template <typename T, int kHeads, int kVecs>
static void dot_products(const typename MultiplyAdd<T>::Element* queries, int64_t stride, const T* keys,
                         int64_t head_dim, float scale, float* scores) {
  Vec dot[kHeads][kVecs];
  for (int h = 0; h < kHeads; ++h) {
    for (int v = 0; v < kVecs; ++v) dot[h][v] = set1(0.0f);
  }
  for (int64_t d = 0; d < head_dim; d += KeyStep<T>::kDepth) add_step(queries + d, stride, keys + d * kChunk, dot);
  for (int h = 0; h < kHeads; ++h) {
    for (int v = 0; v < kVecs; ++v) store(scores + h * kChunk + v * kLanes, mul(dot[h][v], set1(scale)));
  }
}

// The same for `vecs` vectors.
template <typename T, int kHeads,
          int kVecs = vecs_at_once(kHeads) * kLanes < kChunk ? vecs_at_once(kHeads) : kChunk / kLanes>
static void dot_products_of(const typename MultiplyAdd<T>::Element* queries, int64_t stride, const T* keys,
                            int64_t head_dim, float scale, float* scores, int64_t vecs) {
  for (; vecs >= kVecs; vecs -= kVecs, keys += kVecs * kLanes * KeyStep<T>::kDepth, scores += kVecs * kLanes) {
    dot_products<T, kHeads, kVecs>(queries, stride, keys, head_dim, scale, scores);
  }
  if constexpr (kVecs > 1) {
    constexpr int kFewer = kVecs > kBlockVecs ? kBlockVecs : kVecs - 1;
    if (vecs > 0) dot_products_of<T, kHeads, kFewer>(queries, stride, keys, head_dim, scale, scores, vecs);
  }
}

// The same for one key, of which every lane gets the score.
template <typename Element, int kHeads>
static void dot_products_of_one(const Element* queries, int64_t stride, const Element* key, int64_t head_dim,
                                float scale, float* scores) {
  using Product = MultiplyAdd<Element>;
  Vec dot[kHeads];
  for (int h = 0; h < kHeads; ++h) dot[h] = set1(0.0f);
  for (int64_t d = 0; d < head_dim; d += Product::kDepth) {
    const typename Product::Operand operand = Product::inputs(key + d);
    for (int h = 0; h < kHeads; ++h) {
      dot[h] = Product::apply(operand, Product::inputs(queries + h * stride + d), dot[h]);
    }
  }
  for (int h = 0; h < kHeads; ++h) store(scores + h * kChunk, mul(dot[h], set1(scale)));
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

// Two vectors of values. bfloat16 are widened as pairs, which takes half the instructions and leaves every second
// element in either vector.
static inline void load_values(const float* p, Vec* two) {
  two[0] = load(p);
  two[1] = load(p + kLanes);
}
static inline void load_values(const BFloat16* p, Vec* two) {
  two[0] = load_first_of_pairs(p);
  two[1] = load_second_of_pairs(p);
}

// Where element d is accumulated: values are loaded two vectors at a time in blocks of kBlockVecs vectors, and the rest
// one by one.
template <typename T>
static inline int64_t accumulated_at(int64_t d, int64_t head_dim) {
  constexpr int64_t kStep = kBlockVecs * kLanes;
  if (sizeof(T) == sizeof(float) || d >= head_dim / kStep * kStep) return d;
  const int64_t in_pairs = d % (2 * kLanes);
  return d - in_pairs + in_pairs % 2 * kLanes + in_pairs / 2;
}

// accumulated[h][d] = accumulated[h][d] * factor[h] + sum over t of weights[h][t] * values[t][d] for kVecs vectors of
// d, of which `width` elements exist; fewer than all only with kVecs = 1. Where d lies is up to `accumulated_at`. Asks
// for the same elements of `later` values, unless it is null.
template <typename T, int kHeads, int kVecs>
static void add_values(const T* const* values, const void* const* later, Span span, int64_t d, int64_t width,
                       const float* weights, const float* factor, float* accumulated, int64_t stride) {
  Vec total[kHeads][kVecs];
  for (int h = 0; h < kHeads; ++h) {
    for (int v = 0; v < kVecs; ++v) {
      total[h][v] = mul(load(accumulated + h * stride + d + v * kLanes), set1(factor[h]));
    }
  }
  for (int64_t t = span.begin; t < span.end; ++t) {
    if (later != nullptr) {
      const T* first = static_cast<const T*>(later[t]) + d;
      for (int64_t i = 0; i < kVecs * kLanes; i += kCacheLine / int64_t{sizeof(T)}) prefetch(first + i);
    }
    Vec value[kVecs];
    if constexpr (kVecs > 1) {
      for (int v = 0; v < kVecs; v += 2) load_values(values[t] + d + v * kLanes, value + v);
    } else {
      value[0] = width == kLanes ? load(values[t] + d) : load_partial(values[t] + d, static_cast<int>(width), 0.0f);
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

// The same for all elements from d on.
template <typename T, int kHeads, int kVecs = vecs_at_once(kHeads)>
static void add_values_from(const T* const* values, const void* const* later, Span span, int64_t d, int64_t head_dim,
                            const float* weights, const float* factor, float* accumulated, int64_t stride) {
  constexpr int64_t kStep = kVecs * kLanes;
  for (; kVecs == 1 ? d < head_dim : d + kStep <= head_dim; d += kStep) {
    const int64_t width = head_dim - d < kStep ? head_dim - d : kStep;
    add_values<T, kHeads, kVecs>(values, later, span, d, width, weights, factor, accumulated, stride);
  }
  if constexpr (kVecs > 1) {
    constexpr int kFewer = kVecs > kBlockVecs ? kBlockVecs : 1;
    add_values_from<T, kHeads, kFewer>(values, later, span, d, head_dim, weights, factor, accumulated, stride);
  }
}

// Scores of `span` of the current chunk.
template <typename T, int kHeads>
static void score_heads(const AttentionTile<T>& tile, int64_t query, Span span) {
  using Element = typename AttentionTile<T>::Element;
  const int64_t head_dim = tile.args.head_dim, stride = padded_head_dim(tile.args);
  const Element* queries = tile.queries + query * stride;
  if (tile.own) {
    dot_products_of_one<Element, kHeads>(queries, stride, tile.own_key, head_dim, tile.args.scale, tile.weights);
    return;
  }
  const int64_t begin = span.begin / kLanes * kLanes, vecs = (span.end - begin + kLanes - 1) / kLanes;
  dot_products_of<T, kHeads>(queries, stride, tile.keys + begin * KeyStep<T>::kDepth, head_dim, tile.args.scale,
                             tile.weights + begin, vecs);
}

// kHeads query heads from `query` on attend to `span` of the current chunk, whose values are given.
template <typename T, int kHeads>
static void attend_heads(const AttentionTile<T>& tile, const AttentionState& state, int64_t query,
                         const T* const* values, const void* const* later, Span span) {
  score_heads<T, kHeads>(tile, query, span);
  float factor[kHeads];
  for (int h = 0; h < kHeads; ++h) {
    factor[h] = softmax_update(tile.weights + h * kChunk, span, state.max + query + h, state.sum + query + h);
  }

  const int64_t head_dim = tile.args.head_dim, stride = padded_head_dim(tile.args);
  add_values_from<T, kHeads>(values, later, span, 0, head_dim, tile.weights, factor, state.accumulated + query * stride,
                             stride);
}

// `heads` query heads from `query` on, as many at once as fit the registers.
template <typename T, int kHeads = kHeadsAtOnce>
static void attend(const AttentionTile<T>& tile, const AttentionState& state, int64_t query, int64_t heads,
                   const T* const* values, const void* const* later, Span span) {
  for (; heads >= kHeads; heads -= kHeads, query += kHeads) {
    attend_heads<T, kHeads>(tile, state, query, values, later, span);
    later = nullptr;  // asked for
  }
  if constexpr (kHeads > 1) {
    if (heads > 0) attend<T, kHeads - 1>(tile, state, query, heads, values, later, span);
  }
}

template <typename T>
static void load_queries(AttentionTile<T>& tile) {
  const BranchAttentionArgs& args = tile.args;
  const int64_t heads = (tile.rows.end - tile.rows.begin) * tile.group;
  for (int64_t i = 0; i < heads; ++i) {
    const T* query = static_cast<const T*>(args.query) + (tile.rows.begin + i / tile.group) * args.query_row_stride +
                     (tile.kv_head * tile.group + i % tile.group) * args.query_head_stride;
    copy_head(args, query, tile.queries + i * padded_head_dim(args));
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

// Finds the positions [begin, end) of the prefix, as many as are in the chunk of the first one.
template <typename T>
static void locate(const AttentionTile<T>& tile, int64_t begin, int64_t end, Chunk<T>* chunk) {
  const BranchAttentionArgs& args = tile.args;
  const int32_t* blocks = args.block_table + args.row_sequence[tile.rows.begin] * args.block_table_row_stride;
  const int64_t origin = begin / kChunk * kChunk;
  end = end < origin + kChunk ? end : origin + kChunk;
  chunk->origin = origin;
  chunk->span = {begin - origin, end - origin};
  for (int64_t position = begin; position < end;) {
    const int64_t block = position / args.block_size, block_end = (block + 1) * args.block_size;
    const int64_t id = blocks[block];
    const int64_t offset = position - block * args.block_size;
    const T* key = static_cast<const T*>(args.key_cache) + id * args.key_block_stride +
                   tile.kv_head * args.key_head_stride + offset * args.key_position_stride;
    const T* value = static_cast<const T*>(args.value_cache) + id * args.value_block_stride +
                     tile.kv_head * args.value_head_stride + offset * args.value_position_stride;
    for (; position < end && position < block_end; ++position) {
      chunk->keys[position - origin] = key;
      chunk->values[position - origin] = value;
      key += args.key_position_stride;
      value += args.value_position_stride;
    }
  }
}

// Finds as many positions further on, or where there are none, those of now.
template <typename T>
static void look_ahead(PrefixCursor* ahead, Span span, const T* const* now, const void** later) {
  const int64_t found = next_positions(ahead, span.end - span.begin, later + span.begin);
  for (int64_t t = span.begin + found; t < span.end; ++t) later[t] = now[t];
}

// The positions that a row sees in the part that begins at `origin`, relative to it.
static Span visible_within(const BranchAttentionArgs& args, int64_t row, int64_t origin, int64_t size) {
  const int64_t begin = first_visible(args, row) - origin, end = args.row_prefix_length[row] - origin;
  return {begin > 0 ? begin : 0, end < size ? end : size};
}

// First visible position of a part.
template <typename T>
static int64_t begin_of_part(const AttentionTile<T>& tile, int64_t part) {
  const int64_t begin = part * kAttentionPart;
  return tile.visible.begin > begin ? tile.visible.begin : begin;
}

// Rows attend to what they see of a part of the prefix.
template <typename T>
static void attend_prefix_part(AttentionTile<T>& tile, int64_t part, const AttentionState& state, PrefixStream* ahead) {
  const BranchAttentionArgs& args = tile.args;
  const int64_t part_end = (part + 1) * kAttentionPart;
  const int64_t end = tile.visible.end < part_end ? tile.visible.end : part_end;
  Chunk<T> chunk;
  for (int64_t begin = begin_of_part(tile, part); begin < end; begin = chunk.origin + chunk.span.end) {
    locate(tile, begin, end, &chunk);
    look_ahead(&ahead->keys, chunk.span, chunk.keys, chunk.later_keys);
    look_ahead(&ahead->values, chunk.span, chunk.values, chunk.later_values);
    transpose_keys(chunk.keys, chunk.later_keys, chunk.span, args.head_dim, tile.keys);
    for (int64_t row = tile.rows.begin; row < tile.rows.end; ++row) {
      const Span visible = visible_within(args, row, chunk.origin, kChunk);
      if (visible.begin >= visible.end) continue;
      // The last row of a prompt sees most.
      const void* const* later = row + 1 == tile.rows.end ? chunk.later_values : nullptr;
      attend(tile, state, (row - tile.rows.begin) * tile.group, tile.group, chunk.values, later, visible);
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
  const BranchAttentionArgs& args = tile.args;
  tile.own = true;
  for (int64_t row = tile.rows.begin; row < tile.rows.end; ++row) {
    if (!args.row_has_own[row]) continue;
    const int64_t key = row * args.own_key_row_stride + tile.kv_head * args.own_key_head_stride;
    const T* value = static_cast<const T*>(args.own_value) + row * args.own_value_row_stride +
                     tile.kv_head * args.own_value_head_stride;
    copy_head(args, static_cast<const T*>(args.own_key) + key, tile.own_key);
    attend(tile, tile.total, (row - tile.rows.begin) * tile.group, tile.group, &value, nullptr, {0, 1});
  }
  tile.own = false;
}

template <typename T>
static void write_output(const AttentionTile<T>& tile) {
  const BranchAttentionArgs& args = tile.args;
  for (int64_t row = tile.rows.begin; row < tile.rows.end; ++row) {
    const bool sees_nothing = !args.row_has_own[row] && first_visible(args, row) >= args.row_prefix_length[row];
    for (int64_t head = 0; head < tile.group; ++head) {
      const int64_t i = (row - tile.rows.begin) * tile.group + head;
      const float* accumulated = tile.total.accumulated + i * padded_head_dim(args);
      const float scale = sees_nothing ? 0.0f : 1.0f / tile.total.sum[i];
      T* output =
          static_cast<T*>(args.output) + (row * args.num_heads + tile.kv_head * tile.group + head) * args.head_dim;
      for (int64_t d = 0; d < args.head_dim; ++d) {
        from_float(accumulated[accumulated_at<T>(d, args.head_dim)] * scale, output + d);
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
static void attend_rows(const BranchAttentionArgs& args, RowRange rows, RowRange kv_heads, PrefixStream* ahead,
                        void* workspace) {
  AttentionTile<T> tile = make_tile<T>(args, workspace);
  for (int64_t begin = rows.begin; begin < rows.end; begin = tile.rows.end) {
    choose_rows(tile, begin, rows.end);
    for (tile.kv_head = kv_heads.begin; tile.kv_head < kv_heads.end; ++tile.kv_head) {
      load_queries(tile);
      clear(tile, tile.total);
      for (int64_t part = tile.visible.begin / kAttentionPart; part * kAttentionPart < tile.visible.end; ++part) {
        clear(tile, tile.part);
        attend_prefix_part(tile, part, tile.part, ahead);
        merge_part(tile, part, tile.part);
      }
      attend_own(tile);
      write_output(tile);
    }
  }
}

static void branch_attention(const BranchAttentionArgs& args, RowRange rows, RowRange kv_heads, PrefixStream* ahead,
                             void* workspace) {
  args.dtype == DType::kFloat32 ? attend_rows<float>(args, rows, kv_heads, ahead, workspace)
                                : attend_rows<BFloat16>(args, rows, kv_heads, ahead, workspace);
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
                           PrefixStream* ahead, void* workspace) {
  AttentionTile<T> tile = tile_of<T>(args, rows, kv_head, workspace);
  const AttentionState state = state_in(args, floats);
  clear(tile, state);
  attend_prefix_part(tile, part, state, ahead);
}

static void attend_part(const BranchAttentionArgs& args, RowRange rows, int64_t kv_head, int64_t part, float* state,
                        PrefixStream* ahead, void* workspace) {
  args.dtype == DType::kFloat32 ? attend_part_of<float>(args, rows, kv_head, part, state, ahead, workspace)
                                : attend_part_of<BFloat16>(args, rows, kv_head, part, state, ahead, workspace);
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
