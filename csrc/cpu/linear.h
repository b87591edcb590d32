// Linear layers over packed weights, y = epilogue(W x + B a + bias) with B a the update of some rows.
//
// A panel of weights, see packing.h, is multiplied with up to kRowsAtOnce rows whose sums stay in registers. int8
// weights become operands of the multiply-add on their way into the registers, which is exact; a group's sum of q x is
// then multiplied by its scale. For many rows a panel is converted once, into the caller's workspace.
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
static inline RowTile row_tile(int64_t rows, int64_t index, int64_t rows_at_once) {
  const int64_t count = (rows + rows_at_once - 1) / rows_at_once;
  return {{rows * index / count, rows * (index + 1) / count}, index, count};
}

// Weights to ask for while others are multiplied. If the packed ones are read, and once, they lie ahead in the same
// stream; else each tile asks for its part of the next panel, so that memory is as busy during the last one as during
// the first.
struct Ahead {
  const char* weights;
  int64_t stride;  // bytes per step

  Ahead(const char* packed, int64_t panel_bytes, int64_t steps, const RowTile& tile, bool same) {
    weights = packed + (same ? kPrefetchBytes : panel_bytes + panel_bytes * tile.index / tile.count);
    stride = panel_bytes / steps / tile.count;
  }
};

// The int8 weights of a panel as operands of the multiply-add, in the order of packed ones.
template <typename T>
static void expand_panel(const PackedPanels& panels, int64_t panel, typename MultiplyAdd<T>::Element* expanded) {
  using Step = MultiplyAdd<T>;
  const int8_t* weights = static_cast<const int8_t*>(panels.packed) + panel * kPanelWidth * panels.depth;
  for (int64_t k = 0; k < panels.depth; k += Step::kDepth, weights += kPanelWidth * Step::kDepth) {
    typename Step::Operand strip[kStrips];
    Step::weights(weights, strip);
    for (int s = 0; s < kStrips; ++s, expanded += kLanes * Step::kDepth) Step::store_strip(expanded, strip[s]);
  }
}

// sum[r] = W x for the kRows rows of a tile and the output features of a panel, over inputs from `begin` to `end`. Goes
// on in the weights.
template <typename T, typename Weight, int kRows>
static inline __attribute__((always_inline)) void multiply_group(const T* inputs, int64_t input_stride, int64_t begin,
                                                                 int64_t end, const Weight*& weights, Ahead& ahead,
                                                                 Vec (&sum)[kRows][kStrips]) {
  using Step = MultiplyAdd<T>;
  constexpr int64_t kStepSize = int64_t{kPanelWidth} * Step::kDepth, kStepBytes = kStepSize * int64_t{sizeof(Weight)};
  for (int r = 0; r < kRows; ++r) {
    for (int s = 0; s < kStrips; ++s) sum[r][s] = set1(0.0f);
  }
  for (int64_t k = begin; k < end; k += Step::kDepth, weights += kStepSize, ahead.weights += ahead.stride) {
    // Past the end a prefetch does nothing.
    for (int64_t line = 0; line < kStepBytes; line += kCacheLine) prefetch(ahead.weights + line);
    typename Step::Operand strip[kStrips];
    Step::weights(weights, strip);
    for (int r = 0; r < kRows; ++r) {
      const typename Step::Operand input = Step::inputs(inputs + r * input_stride + k);
      for (int s = 0; s < kStrips; ++s) sum[r][s] = Step::apply(strip[s], input, sum[r][s]);
    }
  }
}

template <int kRows>
static inline void store_tile(const Vec (&values)[kRows][kStrips], float* sums) {
  for (int r = 0; r < kRows; ++r) {
    for (int s = 0; s < kStrips; ++s) store(sums + r * kPanelWidth + s * kLanes, values[r][s]);
  }
}

// sums[r][i] = W x for the kRows rows of a tile and the output features of a panel, whose weights are T or, with
// scales, int8 or such that were expanded.
template <typename T, bool kScaled, typename Weight, int kRows>
static void multiply_panel(const LinearTerm& term, int64_t panel, const RowTile& tile, const Weight* weights,
                           float* sums) {
  const PackedPanels& panels = term.panels;
  const int64_t depth = panels.depth, panel_bytes = kPanelWidth * depth * (kScaled ? 1 : int64_t{sizeof(T)});
  const char* packed = static_cast<const char*>(panels.packed) + panel * panel_bytes;
  const bool in_place = reinterpret_cast<const char*>(weights) == packed;
  Ahead ahead(packed, panel_bytes, depth / MultiplyAdd<T>::kDepth, tile, in_place && tile.count == 1);
  const T* inputs = static_cast<const T*>(term.input) + tile.rows.begin * term.input_stride;
  Vec sum[kRows][kStrips];
  if constexpr (!kScaled) {
    multiply_group(inputs, term.input_stride, 0, depth, weights, ahead, sum);
    store_tile(sum, sums);
  } else {
    const float* scales = panels.scales + panel * kPanelWidth * num_groups(depth, panels.group_size);
    Vec total[kRows][kStrips] = {};  // of the groups so far
    for (int64_t begin = 0; begin < depth; begin += panels.group_size, scales += kPanelWidth) {
      const int64_t end = begin + panels.group_size < depth ? begin + panels.group_size : depth;
      multiply_group(inputs, term.input_stride, begin, end, weights, ahead, sum);
      for (int r = 0; r < kRows; ++r) {
        for (int s = 0; s < kStrips; ++s) total[r][s] = fma(load(scales + s * kLanes), sum[r][s], total[r][s]);
      }
    }
    store_tile(total, sums);
  }
}

template <typename T, bool kScaled, typename Weight, int kRows = kRowsAtOnce>
static void multiply_rows(const LinearTerm& term, int64_t panel, const RowTile& tile, const Weight* weights,
                          float* sums) {
  if (tile.rows.end - tile.rows.begin == kRows) {
    multiply_panel<T, kScaled, Weight, kRows>(term, panel, tile, weights, sums);
  } else if constexpr (kRows > 1) {
    multiply_rows<T, kScaled, Weight, kRows - 1>(term, panel, tile, weights, sums);
  }
}

// `expanded` is null if the packed weights are to be read.
template <typename T>
static void multiply(const LinearTerm& term, int64_t panel, const RowTile& tile,
                     const typename MultiplyAdd<T>::Element* expanded, float* sums) {
  const int64_t first = panel * kPanelWidth * term.panels.depth;
  if (term.panels.scales == nullptr) {
    multiply_rows<T, false>(term, panel, tile, static_cast<const T*>(term.panels.packed) + first, sums);
  } else if (expanded == nullptr) {
    multiply_rows<T, true>(term, panel, tile, static_cast<const int8_t*>(term.panels.packed) + first, sums);
  } else {
    multiply_rows<T, true>(term, panel, tile, expanded, sums);
  }
}

// Adds the update to the sums of those rows that have one.
template <typename T>
static void add_update(const LinearArgs& args, int64_t panel, const RowTile& tile, float* sums) {
  const int64_t begin = tile.rows.begin, end = tile.rows.end;
  const int64_t first = begin > args.first_updated ? begin : args.first_updated;
  if (args.update.panels.packed == nullptr || first >= end) return;
  float update[kRowsAtOnce * kPanelWidth];
  multiply<T>(args.update, panel, {{first, end}, tile.index, tile.count}, nullptr, update);
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

template <typename T>
static void linear_of(const LinearArgs& args, RowRange panels) {
  using Element = typename MultiplyAdd<T>::Element;
  float sums[kRowsAtOnce * kPanelWidth];
  const PackedPanels& packed = args.weights.panels;
  const bool expand = packed.scales != nullptr && args.rows >= kManyRows;
  Element* expanded = expand ? static_cast<Element*>(args.workspace) : nullptr;
  // Sums of a group and of the groups before it are to fit the registers together.
  const int64_t rows_at_once = expand && packed.group_size < packed.depth ? kRowsAtOnce / 2 : kRowsAtOnce;
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    if (expand) expand_panel<T>(packed, panel, expanded);
    int64_t row = 0;
    for (int64_t index = 0; row < args.rows; ++index) {
      const RowTile tile = row_tile(args.rows, index, rows_at_once);
      multiply<T>(args.weights, panel, tile, expanded, sums);
      add_update<T>(args, panel, tile, sums);
      finish_rows<T>(args, panel, tile.rows, sums);
      row = tile.rows.end;
    }
  }
}

static void linear(const LinearArgs& args, RowRange panels) {
  args.dtype == DType::kFloat32 ? linear_of<float>(args, panels) : linear_of<BFloat16>(args, panels);
}

// Bytes of LinearArgs::workspace.
static int64_t linear_workspace(DType dtype, const PackedPanels& panels) {
  const size_t element =
      dtype == DType::kFloat32 ? sizeof(MultiplyAdd<float>::Element) : sizeof(MultiplyAdd<BFloat16>::Element);
  return panels.scales == nullptr ? 0 : kPanelWidth * panels.depth * static_cast<int64_t>(element);
}

}  // namespace LLM2_FAST_TIER
}  // namespace llm2_fast
