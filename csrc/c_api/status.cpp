#include "status.h"

#include <cstdio>

#include "llm2_fast/isa.h"

namespace llm2_fast {
namespace {

thread_local char last_error[512];  // no heap memory: there may be none left

}  // namespace

llm2_fast_status fail(llm2_fast_status status, const char* message) noexcept {
  std::snprintf(last_error, sizeof(last_error), "%s", message);
  return status;
}

}  // namespace llm2_fast

using namespace llm2_fast;

const char* llm2_fast_last_error(void) {
  return last_error;
}

const char* llm2_fast_version(void) {
  return LLM2_FAST_VERSION;
}

llm2_fast_status llm2_fast_cpu_isa(const char** name) {
  return guarded([&] {
    if (name == nullptr) throw std::invalid_argument("name: expected a pointer, got NULL");
    *name = isa_name(active_isa());
  });
}
