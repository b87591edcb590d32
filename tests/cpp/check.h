// Checks of the C++ tests: a failed one is printed and counted, and the test goes on.
#pragma once

#include <cstdio>
#include <string>

namespace {

int failures = 0;

#define CHECK(condition)                                                                              \
  do {                                                                                                \
    if (!(condition)) {                                                                               \
      std::printf("%s:%d: failed on %s: %s\n", __FILE__, __LINE__, current_case.c_str(), #condition); \
      ++failures;                                                                                     \
    }                                                                                                 \
  } while (false)

std::string current_case;

// The exit status.
inline int report() {
  std::printf(failures == 0 ? "all checks passed\n" : "%d checks failed\n", failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace
