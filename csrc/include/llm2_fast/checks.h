// Checks of arguments, shared by all who let untrusted callers in. A failed one throws std::invalid_argument with the
// message "name: expected ..., got ...".
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "llm2_fast/decoder.h"
#include "llm2_fast/ops.h"

namespace llm2_fast {

std::invalid_argument argument_error(const std::string& name, const std::string& expected, const std::string& got);

void require_at_least(const std::string& name, int64_t value, int64_t minimum);
void require_equal(const std::string& name, int64_t value, int64_t expected);
void require_index(const std::string& name, int64_t value, int64_t size);

void require_distinct(const std::string& name, const int32_t* values, int64_t count);

// Rows read the block table [num_sequences, max_blocks] and the cache inside their bounds only.
void check_attention_rows(const BranchAttentionArgs& args, int64_t rows, int64_t num_sequences, int64_t max_blocks,
                          int64_t num_blocks);

// The sizes are possible and agree with each other.
void check_spec(const DecoderSpec& spec);

// The head reads layers of this decoder, and as many features as they have.
void check_head(const ScoreHead& head, const DecoderWeights& weights);

void check_slot(const PagedCache& cache, int64_t slot);

// Positions [0, length) of a slot have blocks.
void check_blocks(const PagedCache& cache, int64_t slot, int64_t length);

// The rows of a slot are consecutive, and its stored rows stand in the order of positions. Memory-safe without.
void check_order(const DecoderRows& rows);

// Token ids are below `vocab_size`, and rows read and write the cache inside its bounds.
void check_rows(const PagedCache& cache, const DecoderRows& rows, int64_t vocab_size);

}  // namespace llm2_fast
