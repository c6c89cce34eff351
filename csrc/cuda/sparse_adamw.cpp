// Family sparse_adamw on CUDA: checks, packing, launch. Nothing is read back from the device.
#include "../binding/sparse_adamw.h"

#include <algorithm>
#include <string>

#include "bindings.h"
#include "device.h"
#include "launchers.h"

namespace partune {
namespace {

const float* device_float(const char* op, const char* name, const std::optional<Tensor>& tensor,
                          const Tensor& like) {
  if (!tensor) return nullptr;
  check_scalar(op, name, *tensor, like, {ScalarType::Float});
  return tensor->const_data_ptr<float>();
}

const int64_t* device_integer(const char* op, const char* name, const std::optional<Tensor>& tensor,
                              const Tensor& like) {
  if (!tensor) return nullptr;
  check_scalar(op, name, *tensor, like, {ScalarType::Long});
  return tensor->const_data_ptr<int64_t>();
}

// A learning rate on the CPU travels by value; one on the device is read there.
void set_lr(const char* op, const Tensor& lr, const Tensor& like, SparseAdamWDeviceStep& step) {
  if (is_on_device(lr)) {
    step.lr = device_float(op, "lr", lr, like);
  } else if (lr.scalar_type() == ScalarType::Double) {
    check_scalar(op, "lr", lr, lr, {ScalarType::Double});
    step.lr_value = float(*lr.const_data_ptr<double>());
  } else {
    check_scalar(op, "lr", lr, lr, {ScalarType::Float});
    step.lr_value = *lr.const_data_ptr<float>();
  }
}

}  // namespace

void sparse_adamw_cuda_(TensorList self, TensorList grads, TensorList crow_indices, TensorList col_indices,
                        TensorList exp_avgs, TensorList exp_avg_sqs, TensorList masters,
                        TensorList state_steps, std::vector<int64_t> parameter_ids, Tensor lr, double beta1,
                        double beta2, double weight_decay, double eps, std::string eps_mode, bool maximize,
                        std::string rounding, std::optional<Tensor> seed, std::optional<Tensor> offset,
                        std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf) {
  const char* op = "sparse_adamw_";
  if (self.empty()) return;
  const SparseAdamWArguments arguments{self,        grads,   crow_indices, col_indices,  exp_avgs,
                                       exp_avg_sqs, masters, state_steps,  parameter_ids};
  SparseAdamWDeviceStep step{};
  step.hyperparameters =
      hyperparameters_of<float>(op, beta1, beta2, weight_decay, eps, eps_mode, maximize, rounding);
  set_lr(op, lr, self[0], step);
  step.seed = device_integer(op, "seed", seed, self[0]);
  step.offset = device_integer(op, "offset", offset, self[0]);
  step.grad_scale = device_float(op, "grad_scale", grad_scale, self[0]);
  step.found_inf = device_float(op, "found_inf", found_inf, self[0]);
  const SparseAdamWList list = pack_list(op, arguments, step.hyperparameters.stochastic);
  STD_TORCH_CHECK(seed || !list.draws, op, ": stochastic rounding needs a seed");

  const DeviceScope scope(self[0].get_device_index());
  const cudaStream_t stream = current_stream(self[0].get_device_index());
  for (int types = 0; types < kSparseAdamWTypesCount; ++types) {
    std::vector<SparseAdamWMatrix> matrices;
    for (size_t i = 0; i < list.matrices.size(); ++i) {
      STD_TORCH_CHECK(self[i].device() == self[0].device(), op, ": all parameters must be on one device");
      if (list.types[i] == types && list.matrices[i].nnz > 0) matrices.push_back(list.matrices[i]);
    }
    if (matrices.empty()) continue;
    STD_TORCH_CHECK(types != kFloat64, op, ": float64 parameters are stepped on the CPU only");
    check_launch(op, launch_sparse_adamw(SparseAdamWTypes(types), step, matrices.data(), int(matrices.size()),
                                         stream));
  }
}

}  // namespace partune
