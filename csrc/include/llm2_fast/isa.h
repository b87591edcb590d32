// The instruction-set tiers of the CPU kernels.
#pragma once

#include <string>
#include <vector>

namespace llm2_fast {

enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Bf16 };

// "portable", "avx2", "avx512" or "avx512_bf16".
const char* isa_name(Isa isa);

// The tiers that are compiled in and that this CPU can run, lowest first. Never empty.
const std::vector<Isa>& runnable_isas();

// The tier called `name`. Throws std::invalid_argument, naming `argument`, if it is unknown or cannot run here.
Isa parse_isa(const std::string& argument, const std::string& name);

// The tier the ops use: the highest runnable one, or the one named by the environment variable LLM2_FAST_CPU_ISA, read
// at the first call. Throws std::invalid_argument at every call if the variable names no runnable tier.
Isa active_isa();

}  // namespace llm2_fast
