// The CUDA bindings, as register_cuda() lists them.
#pragma once
#include "../binding/sparse_adamw.h"

namespace partune {

void sparse_adamw_cuda_(TensorList self, TensorList grads, TensorList crow_indices, TensorList col_indices,
                        TensorList exp_avgs, TensorList exp_avg_sqs, TensorList masters,
                        TensorList state_steps, std::vector<int64_t> parameter_ids, Tensor lr, double beta1,
                        double beta2, double weight_decay, double eps, std::string eps_mode, bool maximize,
                        std::string rounding, std::optional<Tensor> seed, std::optional<Tensor> offset,
                        std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf);

}  // namespace partune
