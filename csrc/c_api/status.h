// Status codes and the message of the last failure. Nothing that is thrown leaves `guarded`.
#pragma once

#include <exception>
#include <new>
#include <stdexcept>

#include "llm2_fast/llm2_fast.h"

namespace llm2_fast {

// Keeps the message, for this thread, and returns the status.
llm2_fast_status fail(llm2_fast_status status, const char* message) noexcept;

// Calls work() and turns what it throws into a status.
template <typename Work>
llm2_fast_status guarded(const Work& work) noexcept {
  try {
    work();
    return LLM2_FAST_OK;
  } catch (const std::invalid_argument& error) {
    return fail(LLM2_FAST_INVALID_ARGUMENT, error.what());
  } catch (const std::bad_alloc&) {
    return fail(LLM2_FAST_OUT_OF_MEMORY, "out of memory");
  } catch (const std::exception& error) {
    return fail(LLM2_FAST_INTERNAL_ERROR, error.what());
  } catch (...) {
    return fail(LLM2_FAST_INTERNAL_ERROR, "an exception of an unknown type");
  }
}

}  // namespace llm2_fast
