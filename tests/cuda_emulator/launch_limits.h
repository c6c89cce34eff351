// What a launch may ask for on each architecture.
#pragma once
#include <cstddef>
#include <string>

#include "core.h"

namespace emulator {

// What is wrong, or nothing.
std::string launch_error(const Launch& launch);
std::string shared_memory_error(size_t static_bytes, size_t dynamic_bytes);

}  // namespace emulator
