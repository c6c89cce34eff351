// Family sparse_adamw on CUDA: checks, packing, launch. Nothing is read back from the device.
#include "../binding/sparse_adamw.h"

#include <torch/csrc/stable/ops.h>

#include <string>

#include "bindings.h"
#include "device.h"
#include "device_step.h"
#include "launchers.h"

namespace partune {
namespace {

// The matrices whose entry in `kinds` is `kind`, those without entries left out.
template <typename Kind>
std::vector<SparseAdamWMatrix> matrices_of(const std::vector<SparseAdamWMatrix>& matrices,
                                           const std::vector<Kind>& kinds, Kind kind) {
  std::vector<SparseAdamWMatrix> chosen;
  for (size_t i = 0; i < matrices.size(); ++i) {
    if (kinds[i] == kind && matrices[i].nnz > 0) chosen.push_back(matrices[i]);
  }
  return chosen;
}

// All bits of a dtype's exponent: a number that has them is infinite or NaN.
uint64_t exponent_bits(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return 0x7ff0000000000000u;
    case ScalarType::Float:
      return 0x7f800000u;
    case ScalarType::BFloat16:
      return 0x7f80u;
    default:
      return 0x7c00u;
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
  check_one_device(op, self);
  const auto step_of = [&](auto real) {
    using Real = decltype(real);
    const auto hyperparameters =
        hyperparameters_of<Real>(op, beta1, beta2, weight_decay, eps, eps_mode, maximize, rounding);
    return device_step(op, self[0], hyperparameters, lr, seed, offset, grad_scale, found_inf);
  };
  const SparseAdamWDeviceStep<float> step = step_of(float());
  const SparseAdamWList list = pack_list(op, arguments, step.hyperparameters.stochastic);
  STD_TORCH_CHECK(seed || !list.draws, op, ": stochastic rounding needs a seed");

  const DeviceScope scope(self[0].get_device_index());
  const cudaStream_t stream = current_stream(self[0].get_device_index());
  for (int types = 0; types < kSparseAdamWTypesCount; ++types) {
    const std::vector<SparseAdamWMatrix> matrices =
        matrices_of(list.matrices, list.types, SparseAdamWTypes(types));
    if (types == kFloat64) {
      check_launch(
          op, launch_sparse_adamw_float64(step_of(double()), matrices.data(), int(matrices.size()), stream));
    } else {
      check_launch(op, launch_sparse_adamw(SparseAdamWTypes(types), step, matrices.data(),
                                           int(matrices.size()), stream));
    }
  }
}

void found_inf_cuda_(Tensor found_inf, TensorList grads, TensorList crow_indices, TensorList col_indices) {
  const char* op = "found_inf_";
  const std::vector<SparseAdamWMatrix> gradients = pack_gradients(op, grads, crow_indices, col_indices);
  if (grads.empty()) return;
  check_one_device(op, grads);
  check_scalar(op, "found_inf", found_inf, grads[0], {ScalarType::Float});
  std::vector<ScalarType> dtypes;
  for (const Tensor& grad : grads) dtypes.push_back(grad.scalar_type());
  const DeviceScope scope(found_inf.get_device_index());
  const cudaStream_t stream = current_stream(found_inf.get_device_index());
  for (ScalarType dtype : {ScalarType::Double, ScalarType::Float, ScalarType::BFloat16, ScalarType::Half}) {
    const std::vector<SparseAdamWMatrix> matrices = matrices_of(gradients, dtypes, dtype);
    if (matrices.empty()) continue;
    const int bytes = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
    check_launch(op, launch_found_inf(bytes, exponent_bits(dtype), matrices.data(), int(matrices.size()),
                                      found_inf.mutable_data_ptr<float>(), stream));
  }
}

Tensor remap_cuda_(TensorList new_values, TensorList old_values, Tensor old_crow_indices,
                   Tensor old_col_indices, Tensor new_crow_indices, Tensor new_col_indices) {
  const char* op = "remap_";
  const RemapArguments arguments = pack_remap(op, new_values, old_values, old_crow_indices, old_col_indices,
                                              new_crow_indices, new_col_indices);
  const DeviceScope scope(new_crow_indices.get_device_index());
  Tensor kept = torch::stable::empty({}, ScalarType::Long, std::nullopt, new_crow_indices.device());
  torch::stable::zero_(kept);
  check_launch(op, launch_remap(arguments.csrs, arguments.values.data(), int(arguments.values.size()),
                                kept.mutable_data_ptr<int64_t>(),
                                current_stream(new_crow_indices.get_device_index())));
  return kept;
}

}  // namespace partune
