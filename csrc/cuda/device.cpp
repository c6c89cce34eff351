#include "device.h"

#include <cstdlib>
#include <sstream>
#include <stdexcept>

// Only a torch with CUDA has this symbol; without one nothing calls it.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                            void** ret_stream);

namespace partune {

CudaProbe cuda_probe() {
  CudaProbe probe{};
  cudaDriverGetVersion(&probe.driver_version);
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) probe.error = cudaGetErrorString(error);
  for (int i = 0; i < count && error == cudaSuccess; ++i) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, i) == cudaSuccess) {
      probe.devices.push_back({properties.name, properties.major, properties.minor});
    }
  }
  cudaGetLastError();  // a machine without a driver must not leave an error behind
  return probe;
}

int cuda_compiled_version() { return CUDART_VERSION; }

bool has_cuda_binary(int major, int minor) {
  std::stringstream archs(PARTUNE_CUDA_ARCHS);
  for (std::string arch; archs >> arch;) {
    char* rest = nullptr;
    const int number = int(std::strtol(arch.c_str(), &rest, 10));
    const std::string kind = rest;
    const bool same_major = number / 10 == major;
    if (kind[0] == 'a') {
      if (same_major && number % 10 == minor) return true;
    } else if (kind[0] == 'f') {
      if (same_major && number % 10 <= minor) return true;
    } else if (same_major ? number % 10 <= minor : (kind.empty() && number < major * 10)) {
      return true;
    }
  }
  return false;
}

bool is_on_device(const torch::stable::Tensor& tensor) { return tensor.is_cuda(); }

cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  if (!aoti_torch_get_current_cuda_stream || aoti_torch_get_current_cuda_stream(device, &stream) != 0) {
    throw std::runtime_error("partune: this torch has no CUDA stream to run on");
  }
  return static_cast<cudaStream_t>(stream);
}

void check_launch(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  std::string message = std::string(op) + ": " + cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice) {
    message += "; this build has no binary for this GPU, and `partune info` tells what to build";
  }
  throw std::runtime_error(message);
}

DeviceScope::DeviceScope(int device) {
  check_launch("cudaGetDevice", cudaGetDevice(&previous_));
  check_launch("cudaSetDevice", cudaSetDevice(device));
}

DeviceScope::~DeviceScope() { cudaSetDevice(previous_); }

}  // namespace partune
