// Counter-based random numbers, Philox 4x32-10, the same as llm2_fast/rng.py.
//
// Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
// `static inline` for the reason given in dtype.h.
#pragma once

#include <math.h>

#include <cstdint>

#include "llm2_fast/dtype.h"

namespace llm2_fast {

struct PhiloxCounter {
  uint32_t words[4];
};

// Four random words of a counter under a 64-bit key.
LLM2_FAST_HOST_DEVICE static inline PhiloxCounter philox(PhiloxCounter counter, uint64_t seed) {
  uint32_t c0 = counter.words[0], c1 = counter.words[1], c2 = counter.words[2], c3 = counter.words[3];
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
    const uint64_t p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Uniform in (0, 1): 23 bits keep both ends out in float32.
LLM2_FAST_HOST_DEVICE static inline float uniform_from_word(uint32_t word) {
  return (static_cast<float>(word >> 9) + 0.5f) * 1.1920928955078125e-07f;  // 2**-23
}

// Above every value that `gumbel_from_word` returns; the largest is 16.6355.
constexpr float kGumbelBound = 16.64f;

// Standard Gumbel noise, -log(-log(u)), always finite.
LLM2_FAST_HOST_DEVICE static inline float gumbel_from_word(uint32_t word) {
  return -logf(-logf(uniform_from_word(word)));
}

}  // namespace llm2_fast
