// Writes into the blocks of a paged cache.
#pragma once

#include <cstdint>
#include <cstring>

#include "llm2_fast/ops.h"

namespace llm2_fast {

// Copies some heads of one position of keys or values, a row [num_kv_heads, head_bytes], to an offset in a block of
// `storage` [blocks, num_kv_heads, block_size, head_bytes].
inline void store_in_block(void* storage, int64_t block, int64_t offset, int64_t block_size, int64_t num_kv_heads,
                           RowRange kv_heads, int64_t head_bytes, const void* row) {
  for (int64_t head = kv_heads.begin; head < kv_heads.end; ++head) {
    const int64_t index = (block * num_kv_heads + head) * block_size + offset;
    std::memcpy(static_cast<char*>(storage) + index * head_bytes, static_cast<const char*>(row) + head * head_bytes,
                static_cast<size_t>(head_bytes));
  }
}

}  // namespace llm2_fast
