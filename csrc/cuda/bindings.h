// The CUDA bindings, and the one list that tells the dispatcher of them.
#pragma once
#include <torch/csrc/stable/library.h>

#include "../binding/block_lora.h"
#include "../binding/half_mask.h"
#include "../binding/scale_shift.h"
#include "../binding/select.h"
#include "../binding/sparse_adamw.h"

namespace partune {

void sparse_adamw_cuda_(TensorList self, TensorList grads, TensorList crow_indices, TensorList col_indices,
                        TensorList exp_avgs, TensorList exp_avg_sqs, TensorList masters,
                        TensorList state_steps, std::vector<int64_t> parameter_ids, Tensor lr, double beta1,
                        double beta2, double weight_decay, double eps, std::string eps_mode, bool maximize,
                        std::string rounding, std::optional<Tensor> seed, std::optional<Tensor> offset,
                        std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf);
void found_inf_cuda_(Tensor found_inf, TensorList grads, TensorList crow_indices, TensorList col_indices);
Tensor remap_cuda_(TensorList new_values, TensorList old_values, Tensor old_crow_indices,
                   Tensor old_col_indices, Tensor new_crow_indices, Tensor new_col_indices);
void gather_csr_cuda_(TensorList values, TensorList matrices, TensorList crow_indices,
                      TensorList col_indices);
void scatter_csr_cuda_(TensorList matrices, TensorList values, TensorList crow_indices,
                       TensorList col_indices);
Csr topk_csr_cuda(Tensor scores, int64_t k, bool largest);
Csr threshold_csr_cuda(Tensor scores, double threshold, bool largest);
Csr topk_csr_factors_cuda(Tensor left, Tensor right, int64_t k);
Tensor random_scores_cuda(int64_t rows, int64_t columns, Tensor seed, Tensor step, int64_t parameter_id);
void half_adamw_cuda_(TensorList self, TensorList grads, TensorList live, TensorList ranks,
                      TensorList exp_avgs, TensorList exp_avg_sqs, TensorList masters, TensorList state_steps,
                      std::vector<int64_t> parameter_ids, std::vector<int64_t> mask_ids, std::string level,
                      Tensor lr, double beta1, double beta2, double weight_decay, double eps,
                      std::string eps_mode, bool maximize, std::string rounding,
                      std::optional<Tensor> mask_seed, std::optional<Tensor> seed,
                      std::optional<Tensor> offset, std::optional<Tensor> grad_scale,
                      std::optional<Tensor> found_inf);
Tensor random_mask_cuda(int64_t count, Tensor mask_seed, int64_t mask_id);
Tensor mask_counts_cuda(Tensor mask, int64_t count);
Tensor scale_shift_cuda(Tensor input, Tensor scale, OptionalTensor shift, OptionalTensor bias,
                        std::string activation, int64_t channel_dim);
void scale_shift_cuda_(Tensor input, Tensor scale, OptionalTensor shift, OptionalTensor bias,
                       int64_t channel_dim);
ThreeTensors scale_shift_backward_cuda(Tensor grad, OptionalTensor saved, Tensor scale, OptionalTensor shift,
                                       OptionalTensor bias, std::string activation, int64_t channel_dim,
                                       bool from_output, bool input_grad, bool scale_grad);
ThreeTensors layer_norm_scale_shift_cuda(Tensor input, OptionalTensor weight, OptionalTensor bias,
                                         Tensor scale, OptionalTensor shift, double eps);
ThreeTensors layer_norm_scale_shift_backward_cuda(Tensor grad, Tensor input, Tensor mean, Tensor rstd,
                                                  OptionalTensor weight, OptionalTensor bias, Tensor scale,
                                                  bool input_grad, bool scale_grad);
TwoTensors rms_norm_scale_shift_cuda(Tensor input, OptionalTensor weight, Tensor scale, OptionalTensor shift,
                                     double eps);
ThreeTensors rms_norm_scale_shift_backward_cuda(Tensor grad, Tensor input, Tensor rstd, OptionalTensor weight,
                                                Tensor scale, bool input_grad, bool scale_grad);
Tensor block_lora_cuda_(LoraTensors outputs, Tensor input, LoraTensors downs, LoraTensors ups,
                        LoraScales scales, std::string share, double dropout, std::optional<Tensor> seed,
                        std::optional<Tensor> step, int64_t layer_id);
void block_lora_backward_cuda_(std::optional<Tensor> grad_input, LoraTensors grad_downs, LoraTensors grad_ups,
                               LoraTensors grads, Tensor input, Tensor hidden, LoraTensors downs,
                               LoraTensors ups, LoraScales scales, std::string share, double dropout,
                               std::optional<Tensor> seed, std::optional<Tensor> step, int64_t layer_id,
                               bool accumulate);
void sampled_grad_cuda_(Tensor values, Tensor grad, Tensor input, Tensor crow_indices, Tensor col_indices,
                        std::string route);

// Adds every CUDA kernel to a library.
inline void implement_cuda_ops(torch::stable::detail::StableLibrary& library) {
  library.impl("sparse_adamw_", TORCH_BOX(&sparse_adamw_cuda_));
  library.impl("found_inf_", TORCH_BOX(&found_inf_cuda_));
  library.impl("remap_", TORCH_BOX(&remap_cuda_));
  library.impl("gather_csr_", TORCH_BOX(&gather_csr_cuda_));
  library.impl("scatter_csr_", TORCH_BOX(&scatter_csr_cuda_));
  library.impl("topk_csr", TORCH_BOX(&topk_csr_cuda));
  library.impl("threshold_csr", TORCH_BOX(&threshold_csr_cuda));
  library.impl("topk_csr_factors", TORCH_BOX(&topk_csr_factors_cuda));
  library.impl("random_scores", TORCH_BOX(&random_scores_cuda));
  library.impl("block_lora_", TORCH_BOX(&block_lora_cuda_));
  library.impl("block_lora_backward_", TORCH_BOX(&block_lora_backward_cuda_));
  library.impl("half_adamw_", TORCH_BOX(&half_adamw_cuda_));
  library.impl("random_mask", TORCH_BOX(&random_mask_cuda));
  library.impl("mask_counts", TORCH_BOX(&mask_counts_cuda));
  library.impl("scale_shift", TORCH_BOX(&scale_shift_cuda));
  library.impl("scale_shift_", TORCH_BOX(&scale_shift_cuda_));
  library.impl("scale_shift_backward", TORCH_BOX(&scale_shift_backward_cuda));
  library.impl("layer_norm_scale_shift", TORCH_BOX(&layer_norm_scale_shift_cuda));
  library.impl("layer_norm_scale_shift_backward", TORCH_BOX(&layer_norm_scale_shift_backward_cuda));
  library.impl("rms_norm_scale_shift", TORCH_BOX(&rms_norm_scale_shift_cuda));
  library.impl("rms_norm_scale_shift_backward", TORCH_BOX(&rms_norm_scale_shift_backward_cuda));
  library.impl("sampled_grad_", TORCH_BOX(&sampled_grad_cuda_));
}

}  // namespace partune
