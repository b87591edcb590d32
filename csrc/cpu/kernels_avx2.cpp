#include "simd_avx2.h"
#define LLM2_FAST_TIER avx2
#include "kernels_of_tier.h"
