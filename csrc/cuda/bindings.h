// The CUDA bindings, and the one list that tells the dispatcher of them.
#pragma once
#include <torch/csrc/stable/library.h>

#include "../binding/sparse_adamw.h"

namespace partune {

void sparse_adamw_cuda_(TensorList self, TensorList grads, TensorList crow_indices, TensorList col_indices,
                        TensorList exp_avgs, TensorList exp_avg_sqs, TensorList masters,
                        TensorList state_steps, std::vector<int64_t> parameter_ids, Tensor lr, double beta1,
                        double beta2, double weight_decay, double eps, std::string eps_mode, bool maximize,
                        std::string rounding, std::optional<Tensor> seed, std::optional<Tensor> offset,
                        std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf);

// Adds every CUDA kernel to a library.
inline void implement_cuda_ops(torch::stable::detail::StableLibrary& library) {
  library.impl("sparse_adamw_", TORCH_BOX(&sparse_adamw_cuda_));
}

}  // namespace partune
