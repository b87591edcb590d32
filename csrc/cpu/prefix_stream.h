// Where attention will get to, across heads and sequences, so that it can ask memory for keys and values before.
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

// How far keys or values have been found.
struct PrefixCursor {
  bool values;                 // or keys
  const PrefixRun *run, *end;  // what is left
  int64_t position;            // of `run`, the first one behind the current block
  const char* next;            // in the current block
  int64_t left;                // positions of the current block
  int64_t stride;              // bytes from one to the next
};

// What attention reads, in the order in which it does, some positions ahead of it. For each position that it works on
// it takes the next one from here and asks for it.
struct PrefixStream {
  PrefixCursor keys, values;
};

// Begins anew with `runs`, which must exist as long as the stream, and asks for the first positions.
void start(PrefixStream* stream, const PrefixRun* runs, const PrefixRun* end);

// Finds where the next `count` positions lie. Returns how many there are.
int64_t next_positions(PrefixCursor* cursor, int64_t count, const void** addresses);

}  // namespace llm2_fast
