// Family half_mask on CUDA: checks, packing, launch. Nothing is read back from the device.
#include "../binding/half_mask.h"

#include <torch/csrc/stable/ops.h>

#include <string>

#include "bindings.h"
#include "device.h"
#include "device_step.h"
#include "launchers.h"

namespace partune {
namespace {

// The matrices of one combination of dtypes, those without live entries left out.
std::vector<HalfMatrix> matrices_of(const HalfList& list, SparseAdamWTypes types) {
  std::vector<HalfMatrix> chosen;
  for (size_t i = 0; i < list.matrices.size(); ++i) {
    if (list.types[i] == types && list.matrices[i].entries.nnz > 0) chosen.push_back(list.matrices[i]);
  }
  return chosen;
}

}  // namespace

void half_adamw_cuda_(TensorList self, TensorList grads, TensorList live, TensorList ranks,
                      TensorList exp_avgs, TensorList exp_avg_sqs, TensorList masters, TensorList state_steps,
                      std::vector<int64_t> parameter_ids, std::vector<int64_t> mask_ids, std::string level,
                      Tensor lr, double beta1, double beta2, double weight_decay, double eps,
                      std::string eps_mode, bool maximize, std::string rounding,
                      std::optional<Tensor> mask_seed, std::optional<Tensor> seed,
                      std::optional<Tensor> offset, std::optional<Tensor> grad_scale,
                      std::optional<Tensor> found_inf) {
  const char* op = "half_adamw_";
  if (self.empty()) return;
  const HalfArguments arguments{self,        grads,   live,        ranks,         exp_avgs,
                                exp_avg_sqs, masters, state_steps, parameter_ids, mask_ids};
  check_one_device(op, self);
  const auto step_of = [&](auto real) {
    using Real = decltype(real);
    const auto hyperparameters =
        hyperparameters_of<Real>(op, beta1, beta2, weight_decay, eps, eps_mode, maximize, rounding);
    return device_step(op, self[0], hyperparameters, lr, seed, offset, grad_scale, found_inf);
  };
  const SparseAdamWDeviceStep<float> step = step_of(float());
  const int64_t* mask_key = device_integer(op, "mask_seed", mask_seed, self[0]);
  const HalfList list = pack_half_list(op, half_level(op, level), arguments, step.hyperparameters.stochastic);
  STD_TORCH_CHECK(seed || !list.draws, op, ": stochastic rounding needs a seed");
  STD_TORCH_CHECK(mask_seed || !list.draws_masks, op, ": a mask that isn't stored needs mask_seed");

  const DeviceScope scope(self[0].get_device_index());
  const cudaStream_t stream = current_stream(self[0].get_device_index());
  for (int types = 0; types < kSparseAdamWTypesCount; ++types) {
    const std::vector<HalfMatrix> matrices = matrices_of(list, SparseAdamWTypes(types));
    const int count = int(matrices.size());
    check_launch(
        op, types == kFloat64
                ? launch_half_adamw_float64(step_of(double()), mask_key, matrices.data(), count, stream)
                : launch_half_adamw(SparseAdamWTypes(types), step, mask_key, matrices.data(), count, stream));
  }
}

Tensor random_mask_cuda(int64_t count, Tensor mask_seed, int64_t mask_id) {
  const char* op = "random_mask";
  STD_TORCH_CHECK(count >= 0, op, ": count must not be negative");
  check_scalar(op, "mask_seed", mask_seed, mask_seed, {ScalarType::Long});
  const DeviceScope scope(mask_seed.get_device_index());
  Tensor mask = torch::stable::empty({mask_words(count)}, ScalarType::Int, std::nullopt, mask_seed.device());
  check_launch(op, launch_random_mask(reinterpret_cast<uint32_t*>(mask.mutable_data_ptr<int32_t>()), count,
                                      mask_seed.const_data_ptr<int64_t>(), uint32_t(mask_id),
                                      current_stream(mask_seed.get_device_index())));
  return mask;
}

Tensor mask_counts_cuda(Tensor mask, int64_t count) {
  const char* op = "mask_counts";
  check_mask(op, mask, count);
  const DeviceScope scope(mask.get_device_index());
  Tensor counts = torch::stable::empty({mask_tiles(count)}, ScalarType::Long, std::nullopt, mask.device());
  check_launch(
      op, launch_mask_counts(reinterpret_cast<const uint32_t*>(mask.const_data_ptr<int32_t>()), count,
                             counts.mutable_data_ptr<int64_t>(), current_stream(mask.get_device_index())));
  return counts;
}

}  // namespace partune
