// The numbers of an AdamW step as its kernels take them: what lies on the device is read there.
#pragma once
#include "../binding/sparse_adamw.h"
#include "device.h"

namespace partune {

inline void check_one_device(const char* op, const TensorList& tensors) {
  for (const Tensor& tensor : tensors) {
    STD_TORCH_CHECK(tensor.device() == tensors[0].device(), op, ": all parameters must be on one device");
  }
}

inline const float* device_float(const char* op, const char* name, const std::optional<Tensor>& tensor,
                                 const Tensor& like) {
  if (!tensor) return nullptr;
  check_scalar(op, name, *tensor, like, {ScalarType::Float});
  return tensor->const_data_ptr<float>();
}

inline const int64_t* device_integer(const char* op, const char* name, const std::optional<Tensor>& tensor,
                                     const Tensor& like) {
  if (!tensor) return nullptr;
  check_scalar(op, name, *tensor, like, {ScalarType::Long});
  return tensor->const_data_ptr<int64_t>();
}

// A learning rate on the CPU travels by value; one on the device is read there.
template <typename Real>
void set_lr(const char* op, const Tensor& lr, const Tensor& like, SparseAdamWDeviceStep<Real>& step) {
  if (is_on_device(lr)) {
    step.lr = device_float(op, "lr", lr, like);
  } else if (lr.scalar_type() == ScalarType::Double) {
    check_scalar(op, "lr", lr, lr, {ScalarType::Double});
    step.lr_value = Real(*lr.const_data_ptr<double>());
  } else {
    check_scalar(op, "lr", lr, lr, {ScalarType::Float});
    step.lr_value = Real(*lr.const_data_ptr<float>());
  }
}

template <typename Real>
SparseAdamWDeviceStep<Real> device_step(const char* op, const Tensor& like,
                                        const AdamWHyperparameters<Real>& hyperparameters, const Tensor& lr,
                                        const std::optional<Tensor>& seed,
                                        const std::optional<Tensor>& offset,
                                        const std::optional<Tensor>& grad_scale,
                                        const std::optional<Tensor>& found_inf) {
  SparseAdamWDeviceStep<Real> step{};
  step.hyperparameters = hyperparameters;
  set_lr(op, lr, like, step);
  step.seed = device_integer(op, "seed", seed, like);
  step.offset = device_integer(op, "offset", offset, like);
  step.grad_scale = device_float(op, "grad_scale", grad_scale, like);
  step.found_inf = device_float(op, "found_inf", found_inf, like);
  return step;
}

}  // namespace partune
