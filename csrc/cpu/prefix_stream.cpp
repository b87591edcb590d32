#include "prefix_stream.h"

#include <algorithm>

namespace llm2_fast {
namespace {

constexpr int64_t kAhead = 64;  // positions: some tens of kilobytes, as much as memory delivers in a microsecond

PrefixCursor cursor_of(const PrefixRun* runs, const PrefixRun* end, bool values) {
  PrefixCursor cursor = {};
  cursor.values = values;
  cursor.run = runs;
  cursor.end = end;
  if (runs != end) cursor.position = runs->begin;
  return cursor;
}

// Goes on to the next block; false at the end.
bool next_block(PrefixCursor* cursor) {
  while (cursor->run != cursor->end && cursor->position >= cursor->run->end) {
    if (++cursor->run != cursor->end) cursor->position = cursor->run->begin;
  }
  if (cursor->run == cursor->end) return false;
  const PrefixRun& run = *cursor->run;
  const BranchAttentionArgs& args = *run.args;
  const int64_t size = size_of(args.dtype), index = cursor->position / args.block_size;
  const int64_t offset = cursor->position - index * args.block_size;
  const int64_t block = args.block_table[args.row_sequence[run.row] * args.block_table_row_stride + index];
  const int64_t key = block * args.key_block_stride + run.kv_head * args.key_head_stride;
  const int64_t value = block * args.value_block_stride + run.kv_head * args.value_head_stride;
  const int64_t stride = cursor->values ? args.value_position_stride : args.key_position_stride;
  const char* storage = static_cast<const char*>(cursor->values ? args.value_cache : args.key_cache);
  cursor->next = storage + ((cursor->values ? value : key) + offset * stride) * size;
  cursor->stride = stride * size;
  cursor->left = std::min(args.block_size - offset, run.end - cursor->position);
  cursor->position += cursor->left;
  return true;
}

// Asks for the first positions.
void ask_for_first(PrefixCursor* cursor) {
  if (cursor->run == cursor->end) return;
  const BranchAttentionArgs& args = *cursor->run->args;
  const int64_t bytes = args.head_dim * size_of(args.dtype);
  const void* addresses[kAhead];
  const int64_t found = next_positions(cursor, kAhead, addresses);
  for (int64_t i = 0; i < found; ++i) {
    const char* position = static_cast<const char*>(addresses[i]);
    for (int64_t line = 0; line < bytes; line += kCacheLine) prefetch(position + line);
  }
}

}  // namespace

void start(PrefixStream* stream, const PrefixRun* runs, const PrefixRun* end) {
  *stream = {cursor_of(runs, end, false), cursor_of(runs, end, true)};
  ask_for_first(&stream->keys);
  ask_for_first(&stream->values);
}

int64_t next_positions(PrefixCursor* cursor, int64_t count, const void** addresses) {
  int64_t found = 0;
  for (; found < count && (cursor->left > 0 || next_block(cursor)); --cursor->left) {
    addresses[found++] = cursor->next;
    cursor->next += cursor->stride;
  }
  return found;
}

}  // namespace llm2_fast
