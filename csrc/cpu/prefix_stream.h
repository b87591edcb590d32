// Asks memory for the keys and values of prefixes before attention gets to them, evenly, across heads and sequences.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace llm2_fast {

// Positions [begin, end) of the prefix that `row` attends to, of one key/value head.
struct PrefixRun {
  const BranchAttentionArgs* args;
  int64_t row, kv_head;
  int64_t begin, end;
};

// How far keys or values have been asked for.
struct PrefixCursor {
  bool values;                 // or keys
  const PrefixRun *run, *end;  // what is left
  int64_t position;            // of `run`, the first one behind the current block
  const char* next;            // in the current block
  int64_t left;                // positions of the current block
  int64_t bytes, stride;       // of a position
};

// What attention reads, in the order in which it does. It asks for one more position for each that it is done with.
struct PrefixStream {
  PrefixCursor keys, values;
};

// Begins anew with `runs`, which must exist as long as the stream, and asks for the first positions.
void start(PrefixStream* stream, const PrefixRun* runs, const PrefixRun* end);

// Goes on to the next block; false at the end.
bool next_block(PrefixCursor* cursor);

// Asks for so many more positions, as far as there are any. For the second-level cache, which can wait for more lines
// at once than the first.
static inline void ask(PrefixCursor* cursor, int64_t positions) {
  while (positions > 0 && (cursor->left > 0 || next_block(cursor))) {
    const int64_t count = positions < cursor->left ? positions : cursor->left;
    const int64_t bytes = cursor->bytes, stride = cursor->stride;
    const char *next = cursor->next, *end = next + count * stride;
    for (; next != end; next += stride) {
      for (int64_t line = 0; line < bytes; line += kCacheLine) __builtin_prefetch(next + line, 0, 2);
    }
    cursor->next = end;
    cursor->left -= count;
    positions -= count;
  }
}

}  // namespace llm2_fast
