#include "llm2_fast/isa.h"

#include <cstdlib>
#include <stdexcept>

namespace llm2_fast {
namespace {

std::vector<Isa> detect() {
  std::vector<Isa> isas = {Isa::kPortable};
#ifdef LLM2_FAST_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return isas;
  isas.push_back(Isa::kAvx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    isas.push_back(Isa::kAvx512);
    // Of the CPUs with dot products of bfloat16, only Cooper Lake lacks VBMI, which int8 weights need.
    const bool bf16 = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
    if (bf16) isas.push_back(Isa::kAvx512Bf16);
  }
#endif
  return isas;
}

Isa choose() {
  const char* name = std::getenv("LLM2_FAST_CPU_ISA");
  return name == nullptr ? runnable_isas().back() : parse_isa("LLM2_FAST_CPU_ISA", name);
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kPortable:
      break;
  }
  return "portable";
}

const std::vector<Isa>& runnable_isas() {
  static const std::vector<Isa> isas = detect();
  return isas;
}

Isa parse_isa(const std::string& argument, const std::string& name) {
  std::string runnable;
  for (Isa isa : runnable_isas()) {
    if (name == isa_name(isa)) return isa;
    runnable += (runnable.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  throw std::invalid_argument(argument + ": expected a tier that this build and CPU can run (" + runnable + "), got '" +
                              name + "'");
}

Isa active_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace llm2_fast
