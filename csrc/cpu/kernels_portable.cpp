#include "simd_portable.h"
#define LLM2_FAST_TIER portable
#include "kernels_of_tier.h"
