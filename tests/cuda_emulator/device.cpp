// csrc/cuda/device.h for tensors in the CPU's memory, and the few calls that launchers make of CUDA.
#include "../../csrc/cuda/device.h"

#include <cstring>
#include <stdexcept>

namespace partune {

// What kernels read through a pointer on a GPU they read so here; a float64 learning rate is the
// host's, as in torch.
bool is_on_device(const torch::stable::Tensor& tensor) {
  const auto dtype = tensor.scalar_type();
  return dtype == torch::headeronly::ScalarType::Float || dtype == torch::headeronly::ScalarType::Long;
}

cudaStream_t current_stream(int) { return nullptr; }

void check_launch(const char* op, cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(op) + ": CUDA error " + std::to_string(error));
}

DeviceScope::DeviceScope(int) {}
DeviceScope::~DeviceScope() {}  // NOLINT(modernize-use-equals-default)

}  // namespace partune

extern "C" {

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
}
