// Devices, streams and errors of CUDA, for bindings that also load where there is no CUDA at all.
#pragma once
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

namespace partune {

struct CudaDevice {
  std::string name;
  int major, minor;
};

struct CudaProbe {
  int driver_version;  // 13000 means 13.0; 0: no driver
  std::string error;   // why there is no device, or empty
  std::vector<CudaDevice> devices;
};

CudaProbe cuda_probe();
int cuda_compiled_version();

// Whether this build has a binary, or PTX that the driver can compile, for a compute capability.
bool has_cuda_binary(int major, int minor);

// Registers the CUDA kernels with torch's dispatcher, once.
void register_cuda();

// Whether a kernel can read a tensor's memory; else its number must travel by value.
bool is_on_device(const torch::stable::Tensor& tensor);

// torch's current stream of a device.
cudaStream_t current_stream(int device);
void check_launch(const char* op, cudaError_t error);

// Makes a device current for a scope.
class DeviceScope {
 public:
  explicit DeviceScope(int device);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int previous_ = -1;
};

}  // namespace partune
