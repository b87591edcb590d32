// The decoder's classes in the Python module.
#pragma once

#include <pybind11/pybind11.h>

namespace llm2_fast {

void bind_decoder(pybind11::module_& module);

}  // namespace llm2_fast
