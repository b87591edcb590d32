// Linear layers over packed weights, y = epilogue(W x + B a + bias) with B a the update of some rows.
//
// A panel of weights, see packing.h, is multiplied with up to kRowsAtOnce rows whose sums stay in registers. Weights
// become operands of the multiply-add on their way into the registers, which is exact; a group's sum of int8 weights is
// then multiplied by its scale. For many rows int8 is converted once, into the caller's workspace. Inputs have been
// converted before, see `operands`: each is read for every panel. Where operands are to stay in the first-level cache,
// a panel is taken in parts of its depth, each by all tiles of rows.
//
// Every product is one chain of multiply-adds over the depth, with scales one per group and one over the groups. So its
// bits depend neither on the rows it is computed with nor on the thread, and few rows and many give the same.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "multiply_add.h"
#include "packing.h"
#include "select_fold.h"
#include "vector_math.h"

namespace llm2_fast {
namespace LLM2_FAST_TIER {

constexpr int64_t kPrefetchBytes = 4096;  // ahead of the weights in use
constexpr int64_t kManyRows = 16;         // converting int8 weights for them once takes less time than for each tile

// One of the tiles that the rows of a product are divided into.
struct RowTile {
  RowRange rows;
  int64_t index, count;
};

// Tiles are as equal as can be: few rows take as long as some more.
static inline RowTile row_tile(int64_t rows, int64_t index, int64_t count) {
  return {{rows * index / count, rows * (index + 1) / count}, index, count};
}

static inline int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// Inputs from `begin` to `end`: a part of the depth, of whole steps and groups.
struct DepthRange {
  int64_t begin, end;
};

// How many inputs are multiplied at once where there are several tiles, so that their weights in a panel stay in the
// first-level cache from tile to tile. As equal as can be, too.
template <typename Element, typename Weight>
static int64_t block_depth(int64_t depth, int64_t group_size) {
  constexpr int64_t kBytes = kPanelWidth * sizeof(Weight) + kRowsAtOnce * sizeof(Element);  // per input
  constexpr int64_t kMost = MultiplyAdd<Element>::kBlockBytes / kBytes;
  const int64_t unit = group_size > 0 ? group_size : 16, count = (depth + kMost - 1) / kMost;
  return (depth + count * unit - 1) / (count * unit) * unit;
}

// Weights to ask for while others are multiplied. If the packed ones are read, and once, they lie ahead in the same
// stream; else each tile asks for its part of the next panel, so that memory is as busy during the last one as during
// the first.
struct Ahead {
  const char* weights;
  int64_t stride;  // bytes per step

  Ahead(const char* packed, int64_t panel_bytes, const RowTile& tile, DepthRange range, int64_t depth,
        int64_t step_depth, bool same) {
    const int64_t done = range.begin * tile.count + (range.end - range.begin) * tile.index;
    weights = packed + (same ? kPrefetchBytes : panel_bytes + panel_bytes * done / (depth * tile.count));
    stride = panel_bytes * step_depth / (depth * tile.count);
  }
};

// int8 weights of a panel as operands of the multiply-add, in the order of packed ones.
template <typename Element>
static void expand(const PackedPanels& panels, int64_t panel, DepthRange range, Element* expanded) {
  using Product = MultiplyAdd<Element>;
  using Step = WeightStep<Element, int8_t>;
  static_assert(Step::kDepth == WeightStep<Element, Element>::kDepth, "steps become steps");
  const int8_t* weights =
      static_cast<const int8_t*>(panels.packed) + (panel * panels.depth + range.begin) * kPanelWidth;
  for (int64_t k = range.begin; k < range.end; k += Step::kDepth, weights += kPanelWidth * Step::kDepth) {
    typename Product::Operand strip[kStrips];
    Step::template load_turn<0>(weights, strip);
    for (int s = 0; s < kStrips; ++s, expanded += kLanes * Step::kDepth) Product::store_strip(expanded, strip[s]);
  }
}

// sum[r] += W x for the kRows rows of a tile and the output features of a panel, over the inputs of `range`. Goes on in
// the weights.
template <typename Element, typename Weight, int kRows>
static inline __attribute__((always_inline)) void add_products(const Element* inputs, int64_t input_stride,
                                                               DepthRange range, const Weight*& weights, Ahead& ahead,
                                                               Vec (&sum)[kRows][kStrips]) {
  using Step = WeightStep<Element, Weight>;
  constexpr int64_t kStepSize = int64_t{kPanelWidth} * Step::kDepth, kStepBytes = kStepSize * int64_t{sizeof(Weight)};
  for (int64_t k = range.begin; k < range.end; k += Step::kDepth, weights += kStepSize, ahead.weights += ahead.stride) {
    // Past the end a prefetch does nothing.
    for (int64_t line = 0; line < kStepBytes; line += kCacheLine) prefetch(ahead.weights + line);
    add_step(inputs + k, input_stride, weights, sum);
  }
}

// Zero, or what is stored.
template <int kRows>
static inline void load_tile(const float* sums, bool zero, Vec (&values)[kRows][kStrips]) {
  for (int r = 0; r < kRows; ++r) {
    for (int s = 0; s < kStrips; ++s) values[r][s] = zero ? set1(0.0f) : load(sums + r * kPanelWidth + s * kLanes);
  }
}

template <int kRows>
static inline void store_tile(const Vec (&values)[kRows][kStrips], float* sums) {
  for (int r = 0; r < kRows; ++r) {
    for (int s = 0; s < kStrips; ++s) store(sums + r * kPanelWidth + s * kLanes, values[r][s]);
  }
}

// Goes on with sums[r][i] = W x, without the scale if there is but one per output feature, for the kRows rows of a tile
// and the output features of a panel. `weights` are those of `range`, packed or expanded.
template <typename Element, bool kGroups, typename Weight, int kRows>
static void multiply_tile(const LinearTerm& term, int64_t panel, const RowTile& tile, DepthRange range,
                          const Weight* weights, float* sums) {
  const PackedPanels& panels = term.panels;
  const int64_t depth = panels.depth, panel_size = kPanelWidth * depth;
  const int64_t panel_bytes = panel_size * (panels.scales == nullptr ? int64_t{sizeof(Weight)} : 1);
  const char* packed = static_cast<const char*>(panels.packed) + panel * panel_bytes;
  const bool in_place = reinterpret_cast<const char*>(weights) == packed;
  Ahead ahead(packed, panel_bytes, tile, range, depth, WeightStep<Element, Weight>::kDepth,
              in_place && tile.count == 1);
  const int64_t stride = term.input.stride;
  const Element* inputs = static_cast<const Element*>(term.input.rows) + tile.rows.begin * stride;
  Vec sum[kRows][kStrips];
  load_tile(sums, range.begin == 0, sum);
  if constexpr (!kGroups) {
    add_products(inputs, stride, range, weights, ahead, sum);
  } else {
    const int64_t group_size = panels.group_size;
    const float* scales =
        panels.scales + (panel * num_groups(depth, group_size) + range.begin / group_size) * kPanelWidth;
    for (int64_t begin = range.begin; begin < range.end; begin += group_size, scales += kPanelWidth) {
      Vec group[kRows][kStrips];
      load_tile(sums, true, group);
      add_products(inputs, stride, {begin, least(begin + group_size, range.end)}, weights, ahead, group);
      for (int r = 0; r < kRows; ++r) {
        for (int s = 0; s < kStrips; ++s) sum[r][s] = fma(load(scales + s * kLanes), group[r][s], sum[r][s]);
      }
    }
  }
  store_tile(sum, sums);
}

template <typename Element, bool kGroups, typename Weight, int kRows = kRowsAtOnce>
static void multiply_rows(const LinearTerm& term, int64_t panel, const RowTile& tile, DepthRange range,
                          const Weight* weights, float* sums) {
  if (tile.rows.end - tile.rows.begin == kRows) {
    multiply_tile<Element, kGroups, Weight, kRows>(term, panel, tile, range, weights, sums);
  } else if constexpr (kRows > 1) {
    multiply_rows<Element, kGroups, Weight, kRows - 1>(term, panel, tile, range, weights, sums);
  }
}

static inline bool has_groups(const PackedPanels& panels) {
  return panels.scales != nullptr && panels.group_size < panels.depth;
}

// `expanded` is null if the packed weights are to be read.
template <typename T>
static void multiply(const LinearTerm& term, int64_t panel, const RowTile& tile, DepthRange range,
                     const typename MultiplyAdd<T>::Element* expanded, float* sums) {
  using Element = typename MultiplyAdd<T>::Element;
  const PackedPanels& panels = term.panels;
  const int64_t first = (panel * panels.depth + range.begin) * kPanelWidth;
  const auto with = [&](const auto* weights) {
    has_groups(panels) ? multiply_rows<Element, true>(term, panel, tile, range, weights, sums)
                       : multiply_rows<Element, false>(term, panel, tile, range, weights, sums);
  };
  if (panels.scales == nullptr) {
    multiply_rows<Element, false>(term, panel, tile, range, static_cast<const T*>(panels.packed) + first, sums);
  } else if (expanded == nullptr) {
    with(static_cast<const int8_t*>(panels.packed) + first);
  } else {
    with(expanded);
  }
}

// sums[r] *= the scales of output features that have one each.
static void apply_scales(const PackedPanels& panels, int64_t panel, int64_t rows, float* sums) {
  const float* scales = panels.scales + panel * kPanelWidth;
  for (int64_t row = 0; row < rows; ++row, sums += kPanelWidth) {
    for (int64_t i = 0; i < kPanelWidth; i += kLanes) store(sums + i, mul(load(scales + i), load(sums + i)));
  }
}

// Adds the update to the sums of those rows of a tile that have one.
template <typename T>
static void add_update(const LinearArgs& args, int64_t panel, const RowTile& tile, float* sums) {
  const int64_t begin = tile.rows.begin, end = tile.rows.end;
  const int64_t first = begin > args.first_updated ? begin : args.first_updated;
  if (args.update.panels.packed == nullptr || first >= end) return;
  float update[kRowsAtOnce * kPanelWidth];
  multiply<T>(args.update, panel, {{first, end}, 0, 1}, {0, args.update.panels.depth}, nullptr, update);
  sums += (first - begin) * kPanelWidth;
  for (int64_t i = 0; i < (end - first) * kPanelWidth; i += kLanes) {
    store(sums + i, add(load(sums + i), load(update + i)));
  }
}

// gate * sigmoid(argument) * up, sigmoid(x) = 1 / (1 + exp(-x)).
static inline Vec sigmoid_mul(Vec gate, Vec argument, Vec up) {
  // exp(-|x|) cannot overflow: sigmoid(x) = (x < 0 ? e : 1) / (1 + e).
  const Vec zero = set1(0.0f), one = set1(1.0f);
  const Vec e = exp_nonpositive(sub(zero, max(argument, sub(zero, argument))));
  return mul(div(mul(gate, where_negative(argument, e, one)), add(one, e)), up);
}

// gelu_tanh(gate) * up. With t = sqrt(2 / pi) * (x + 0.044715 x^3), gelu_tanh(x) is defined as x * (1 + tanh(t)) / 2,
// which is x * sigmoid(2 t): nothing cancels where tanh(t) is close to -1.
static inline Vec gelu_tanh_mul(Vec gate, Vec up) {
  const Vec factor = fma(mul(set1(0.0713548163f), gate), gate, set1(1.59576912f));
  return sigmoid_mul(gate, mul(gate, factor), up);
}

// output[i] = v[i] for i < size.
template <typename T>
static inline void store_first(Vec v, int64_t size, T* output) {
  if (size >= kLanes) {
    store(output, v);
  } else {
    float lanes[kLanes];
    store(lanes, v);
    for (int64_t i = 0; i < size; ++i) from_float(lanes[i], output + i);
  }
}

// The first features of a row's panel, `size` of them.
template <typename T>
static inline void store_panel(const float* sums, int64_t size, T* output) {
  for (int64_t i = 0; i < kPanelWidth; i += kLanes) store_first(load(sums + i), size - i, output + i);
}

static inline void add_panel(const float* sums, int64_t size, float* output) {
  if (size == kPanelWidth) {
    for (int64_t i = 0; i < kPanelWidth; i += kLanes) store(output + i, add(load(output + i), load(sums + i)));
  } else {
    for (int64_t i = 0; i < size; ++i) output[i] += sums[i];
  }
}

static inline void add_bias(const float* bias, int64_t rows, float* sums) {
  for (int64_t row = 0; row < rows; ++row, sums += kPanelWidth) {
    for (int64_t i = 0; i < kPanelWidth; i += kLanes) store(sums + i, add(load(sums + i), load(bias + i)));
  }
}

// Writes the features of a panel for some rows, whose sums are given.
template <typename T>
static void finish_rows(const LinearArgs& args, int64_t panel, RowRange rows, float* sums) {
  const int64_t features = is_gated(args.epilogue) ? kLanes : kPanelWidth;
  const int64_t first = panel * features, rest = args.out_features - first;
  const int64_t size = rest < features ? rest : features;
  if (args.bias != nullptr) add_bias(args.bias + panel * kPanelWidth, rows.end - rows.begin, sums);
  // A loop per epilogue: what does not change from row to row stays in registers.
  const auto each_row = [&](const auto& finish) {
    float* of_row = sums;
    for (int64_t row = rows.begin; row < rows.end; ++row, of_row += kPanelWidth) {
      finish(row, of_row, row * args.output_stride + first);
    }
  };
  T* stored = static_cast<T*>(args.output);
  float* floats = static_cast<float*>(args.output);
  switch (args.epilogue) {
    case Epilogue::kStore:
      each_row([&](int64_t, float* of_row, int64_t at) { store_panel(of_row, size, stored + at); });
      break;
    case Epilogue::kStoreFloat:
      each_row([&](int64_t, float* of_row, int64_t at) { store_panel(of_row, size, floats + at); });
      break;
    case Epilogue::kAdd:
      each_row([&](int64_t, float* of_row, int64_t at) { add_panel(of_row, size, floats + at); });
      break;
    case Epilogue::kSiluMul:  // silu(x) = x * sigmoid(x)
      each_row([&](int64_t, float* of_row, int64_t at) {
        const Vec gate = load(of_row), up = load(of_row + kLanes);
        store_first(sigmoid_mul(gate, gate, up), size, stored + at);
      });
      break;
    case Epilogue::kGeluTanhMul:
      each_row([&](int64_t, float* of_row, int64_t at) {
        store_first(gelu_tanh_mul(load(of_row), load(of_row + kLanes)), size, stored + at);
      });
      break;
    case Epilogue::kSelect:
      each_row([&](int64_t row, float* of_row, int64_t) {
        fold_logits(*args.select, panel, row, first, of_row, size, &args.rankings[row]);
      });
      break;
  }
}

static_assert(kRowsAtOnceInGroups <= kRowsAtOnce, "a tile has no more rows");

// How a product is divided, which changes none of its bits.
template <typename T>
struct Division {
  using Element = typename MultiplyAdd<T>::Element;

  const int64_t rows;
  bool expands;  // int8 weights, before they are multiplied
  bool waits;    // sums of all rows, for the next part of the depth
  int64_t rows_at_once, depth_at_once;

  Division(const PackedPanels& panels, int64_t rows_) : rows(rows_) {
    const bool quantized = panels.scales != nullptr, groups = has_groups(panels);
    expands = quantized && rows >= kManyRows;
    // Sums of a group and of the groups before it are to fit the registers together.
    rows_at_once = expands && groups ? kRowsAtOnceInGroups : kRowsAtOnce;
    const int64_t group_size = groups ? panels.group_size : 0;
    const int64_t block = quantized ? block_depth<Element, Element>(panels.depth, group_size)
                                    : block_depth<Element, T>(panels.depth, group_size);
    waits = (rows > rows_at_once || expands) && block < panels.depth;
    depth_at_once = waits ? block : panels.depth;
  }

  // Bytes of the weights that are expanded at once.
  int64_t expanded_bytes() const { return expands ? depth_at_once * kPanelWidth * int64_t{sizeof(Element)} : 0; }

  int64_t waiting_bytes() const { return waits ? rows * kPanelWidth * int64_t{sizeof(float)} : 0; }
};

// From the products of a tile's rows with a panel to its outputs.
template <typename T>
static void finish_tile(const LinearArgs& args, int64_t panel, const RowTile& tile, float* sums) {
  const PackedPanels& packed = args.weights.panels;
  if (packed.scales != nullptr && !has_groups(packed)) {
    apply_scales(packed, panel, tile.rows.end - tile.rows.begin, sums);
  }
  add_update<T>(args, panel, tile, sums);
  finish_rows<T>(args, panel, tile.rows, sums);
}

template <typename T>
static void linear_of(const LinearArgs& args, RowRange panels) {
  const PackedPanels& packed = args.weights.panels;
  const Division<T> division(packed, args.rows);
  const int64_t num_tiles = (args.rows + division.rows_at_once - 1) / division.rows_at_once;
  char* workspace = static_cast<char*>(args.workspace);
  auto* expanded = division.expands ? reinterpret_cast<typename MultiplyAdd<T>::Element*>(workspace) : nullptr;
  float* waiting = reinterpret_cast<float*>(workspace + division.expanded_bytes());
  float finished[kRowsAtOnce * kPanelWidth];
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    for (DepthRange range = {0, 0}; range.end < packed.depth; range.begin = range.end) {
      range.end = least(range.begin + division.depth_at_once, packed.depth);
      if (division.expands) expand(packed, panel, range, expanded);
      for (int64_t index = 0; index < num_tiles; ++index) {
        const RowTile tile = row_tile(args.rows, index, num_tiles);
        float* sums = division.waits ? waiting + tile.rows.begin * kPanelWidth : finished;
        multiply<T>(args.weights, panel, tile, range, expanded, sums);
        if (range.end == packed.depth) finish_tile<T>(args, panel, tile, sums);
      }
    }
  }
}

static void linear(const LinearArgs& args, RowRange panels) {
  args.dtype == DType::kFloat32 ? linear_of<float>(args, panels) : linear_of<BFloat16>(args, panels);
}

// Bytes of LinearArgs::workspace.
static int64_t linear_workspace(DType dtype, const PackedPanels& panels, int64_t rows) {
  const auto bytes = [&](const auto& division) { return division.expanded_bytes() + division.waiting_bytes(); };
  return dtype == DType::kFloat32 ? bytes(Division<float>(panels, rows)) : bytes(Division<BFloat16>(panels, rows));
}

static int64_t element_size(DType dtype) {
  return dtype == DType::kFloat32 ? sizeof(MultiplyAdd<float>::Element) : sizeof(MultiplyAdd<BFloat16>::Element);
}

static int64_t operands_size(DType dtype, int64_t rows, int64_t depth) {
  return element_size(dtype) == size_of(dtype) ? 0 : rows * depth * element_size(dtype);
}

static LinearInput operands(DType dtype, const LinearInput& input, int64_t rows, int64_t depth, void* buffer) {
  if (operands_size(dtype, rows, depth) == 0) return input;
  const BFloat16* from = static_cast<const BFloat16*>(input.rows);
  float* to = static_cast<float*>(buffer);
  for (int64_t row = 0; row < rows; ++row, from += input.stride, to += depth) to_elements(from, depth, to);
  return {buffer, depth};
}

}  // namespace LLM2_FAST_TIER
}  // namespace llm2_fast
