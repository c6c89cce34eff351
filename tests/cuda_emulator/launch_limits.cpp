#include "launch_limits.h"

#include "options.h"

namespace emulator {
namespace {

// Per block, by request; CUDA C++ Programming Guide, "Compute Capabilities".
struct {
  int arch;
  size_t shared_kib;
} constexpr kArchs[] = {{75, 64}, {80, 163}, {86, 99}, {89, 99}, {90, 227}, {100, 227}, {120, 99}};
// Without a request, and of declared arrays in any case.
constexpr size_t kUnrequestedShared = size_t(48) * 1024;
constexpr size_t kParameterBytes = 32764;

std::string size(dim3 d) {
  return "(" + std::to_string(d.x) + "," + std::to_string(d.y) + "," + std::to_string(d.z) + ")";
}

bool is_within(dim3 d, dim3 most) {
  return d.x >= 1 && d.y >= 1 && d.z >= 1 && d.x <= most.x && d.y <= most.y && d.z <= most.z;
}

}  // namespace

std::string launch_error(const Launch& launch) {
  if (!is_within(launch.grid, dim3(0x7fffffff, 65535, 65535))) return "grid of " + size(launch.grid);
  if (!is_within(launch.block, dim3(1024, 1024, 64)) ||
      launch.block.x * launch.block.y * launch.block.z > 1024) {
    return "block of " + size(launch.block) + " threads";
  }
  if (launch.parameter_bytes > kParameterBytes) {
    return std::to_string(launch.parameter_bytes) + " bytes of parameters, " +
           std::to_string(kParameterBytes) + " can be passed";
  }
  return shared_memory_error(0, launch.shared_bytes);
}

std::string shared_memory_error(size_t static_bytes, size_t dynamic_bytes) {
  const size_t total = static_bytes + dynamic_bytes;
  const std::string text = std::to_string(total) + " bytes of shared memory";
  if (static_bytes > kUnrequestedShared) {
    return text + ", of which more than 48 KB are declared";
  }
  if (total > kUnrequestedShared && dynamic_bytes <= kUnrequestedShared) {
    return text + ": LAUNCH requests more than 48 KB only where the dynamic part alone is larger";
  }
  for (const auto& known : kArchs) {
    if (known.arch == options.arch && total > known.shared_kib * 1024) {
      return text + ", sm_" + std::to_string(known.arch) + " has " + std::to_string(known.shared_kib) + " KB";
    }
  }
  return "";
}

}  // namespace emulator
