#include "llm2_fast/checks.h"

#include <algorithm>
#include <vector>

namespace llm2_fast {

std::invalid_argument argument_error(const std::string& name, const std::string& expected, const std::string& got) {
  return std::invalid_argument(name + ": expected " + expected + ", got " + got);
}

void require_at_least(const std::string& name, int64_t value, int64_t minimum) {
  if (value < minimum) throw argument_error(name, ">= " + std::to_string(minimum), std::to_string(value));
}

void require_equal(const std::string& name, int64_t value, int64_t expected) {
  if (value != expected) throw argument_error(name, std::to_string(expected), std::to_string(value));
}

void require_index(const std::string& name, int64_t value, int64_t size) {
  if (value < 0 || value >= size) {
    throw argument_error(name, "indices in [0, " + std::to_string(size) + ")", std::to_string(value));
  }
}

void require_distinct(const std::string& name, const int32_t* values, int64_t count) {
  std::vector<int32_t> sorted(values, values + count);
  std::sort(sorted.begin(), sorted.end());
  const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
  if (twice != sorted.end()) throw argument_error(name, "distinct numbers", std::to_string(*twice) + " twice");
}

void check_attention_rows(const BranchAttentionArgs& args, int64_t rows, int64_t num_sequences, int64_t max_blocks,
                          int64_t num_blocks) {
  const auto at = [](const char* name, int64_t i) { return std::string(name) + "[" + std::to_string(i) + "]"; };
  const auto below = [](int64_t limit) { return "an index in [0, " + std::to_string(limit) + ")"; };
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t sequence = args.row_sequence[row], length = args.row_prefix_length[row];
    if (sequence < 0 || sequence >= num_sequences) {
      throw argument_error(at("row_sequence", row), below(num_sequences), std::to_string(sequence));
    }
    if (length < 0 || length > max_blocks * args.block_size) {
      const std::string expected = "a length in [0, " + std::to_string(max_blocks * args.block_size) + "]";
      throw argument_error(at("row_prefix_length", row), expected, std::to_string(length));
    }
    const int64_t first = first_visible(args, row) / args.block_size;
    for (int64_t block = first; block * args.block_size < length; ++block) {
      const int64_t id = args.block_table[sequence * args.block_table_row_stride + block];
      if (id < 0 || id >= num_blocks) {
        throw argument_error(at("block_table", sequence) + "[" + std::to_string(block) + "]", below(num_blocks),
                             std::to_string(id));
      }
    }
  }
}

void check_spec(const DecoderSpec& spec) {
  require_at_least("hidden_size", spec.hidden_size, 1);
  require_at_least("intermediate_size", spec.intermediate_size, 1);
  require_at_least("num_heads", spec.num_heads, 1);
  require_at_least("num_kv_heads", spec.num_kv_heads, 1);
  require_at_least("head_dim", spec.head_dim, 1);
  require_at_least("vocab_size", spec.vocab_size, 1);
  if (spec.hidden_size % 2 != 0)
    throw argument_error("hidden_size", "an even number", std::to_string(spec.hidden_size));
  if (spec.num_heads % spec.num_kv_heads != 0) {
    throw argument_error("num_heads", "a multiple of num_kv_heads", std::to_string(spec.num_heads));
  }
  require_at_least("number of rotary tables", static_cast<int64_t>(spec.rotary_tables.size()), 1);
  for (const RotaryTable& table : spec.rotary_tables) {
    require_equal("head_dim", spec.head_dim, 2 * static_cast<int64_t>(table.inv_freq.size()));
  }
}

void check_head(const ScoreHead& head, const DecoderWeights& weights) {
  const int64_t num_layers = static_cast<int64_t>(weights.layers.size());
  for (int64_t layer : head.layers) {
    if (layer != ScoreHead::kFinalLayer) require_index("layers", layer, num_layers - 1);
  }
  const int64_t features = weights.spec.hidden_size * static_cast<int64_t>(head.layers.size());
  const bool dense = !head.dense_bias.empty();
  const int64_t inputs =
      static_cast<int64_t>(head.dense_weight.size()) / (dense ? static_cast<int64_t>(head.dense_bias.size()) : 1);
  require_equal("features of the head", dense ? inputs : static_cast<int64_t>(head.score_weight.size()), features);
}

void check_slot(const PagedCache& cache, int64_t slot) {
  require_index("slots", slot, cache.num_slots);
}

void check_blocks(const PagedCache& cache, int64_t slot, int64_t length) {
  require_index("positions", length - 1, cache.max_blocks * cache.block_size);
  for (int64_t block = 0; block * cache.block_size < length; ++block) {
    require_index("block_table", cache.block_table[slot * cache.block_table_row_stride + block], cache.num_blocks);
  }
}

void check_order(const DecoderRows& rows) {
  std::vector<int32_t> runs;  // their slots
  int64_t last_stored = 0;    // its position
  for (int64_t i = 0; i < rows.count; ++i) {
    if (i == 0 || rows.slots[i] != rows.slots[i - 1]) {
      runs.push_back(rows.slots[i]);
      last_stored = INT64_MIN;
    }
    if (!rows.stored[i]) continue;
    if (rows.positions[i] <= last_stored) {
      throw argument_error("positions", "stored rows of a slot in ascending order",
                           std::to_string(rows.positions[i]) + " after " + std::to_string(last_stored));
    }
    last_stored = rows.positions[i];
  }
  require_distinct("slots of runs of rows", runs.data(), static_cast<int64_t>(runs.size()));
}

void check_rows(const PagedCache& cache, const DecoderRows& rows, int64_t vocab_size) {
  for (int64_t i = 0; i < rows.count; ++i) {
    require_index("token_ids", rows.token_ids[i], vocab_size);
    require_at_least("positions", rows.positions[i], 0);
    check_slot(cache, rows.slots[i]);
    // A later row of the same slot needs the same blocks, and more.
    const bool last =
        i + 1 == rows.count || rows.slots[i + 1] != rows.slots[i] || rows.positions[i + 1] <= rows.positions[i];
    if (last) check_blocks(cache, rows.slots[i], int64_t{rows.positions[i]} + 1);
  }
}

}  // namespace llm2_fast
