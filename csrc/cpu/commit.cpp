#include <cstring>

#include "llm2_fast/ops.h"
#include "paged_storage.h"

namespace llm2_fast {
namespace {

void commit_row(const CommitArgs& args, int64_t row, int64_t slot) {
  const int64_t element = size_of(args.dtype), head_bytes = args.head_dim * element;
  const int64_t row_bytes = args.num_kv_heads * head_bytes, hidden_bytes = args.hidden_size * element;
  const int64_t position = args.lengths[slot], offset = position % args.block_size;
  const int64_t block = args.block_table[slot * args.block_table_row_stride + position / args.block_size];
  for (int64_t layer = 0; layer < args.num_layers; ++layer) {
    const int64_t target = layer * args.num_blocks + block, source = (layer * args.num_rows + row) * row_bytes;
    store_in_block(args.keys, target, offset, args.block_size, args.num_kv_heads, {0, args.num_kv_heads}, head_bytes,
                   static_cast<const char*>(args.own_key) + source);
    store_in_block(args.values, target, offset, args.block_size, args.num_kv_heads, {0, args.num_kv_heads}, head_bytes,
                   static_cast<const char*>(args.own_value) + source);
  }
  if (args.hidden != nullptr) {
    std::memcpy(static_cast<char*>(args.hidden_states) + slot * hidden_bytes,
                static_cast<const char*>(args.hidden) + row * hidden_bytes, static_cast<size_t>(hidden_bytes));
  }
  ++args.lengths[slot];
}

}  // namespace

void commit(const CommitArgs& args, RowRange sequences) {
  for (int64_t b = sequences.begin; b < sequences.end; ++b) {
    if (args.index[b] >= 0) commit_row(args, int64_t{args.first_row[b]} + args.index[b], args.slots[b]);
  }
}

}  // namespace llm2_fast
