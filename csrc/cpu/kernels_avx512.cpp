#include "simd_avx512.h"
#define LLM2_FAST_TIER avx512
#include "kernels_of_tier.h"
