// Memory in pages of 2 MiB for weights, which are read from end to end for every token.
#pragma once

#include <cstdint>
#include <memory>

namespace llm2_fast {

// Zeroed memory, aligned for vectors. Several share pages, so layers smaller than a page get large ones as well: with
// pages of 4 KiB a processor looks up 500 times as many addresses, and its prefetchers stop at every one. Memory goes
// back to the system once all that shares it is released. Throws std::bad_alloc.
std::shared_ptr<void> allocate_in_large_pages(int64_t bytes);

}  // namespace llm2_fast
