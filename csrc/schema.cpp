// Every op of partune, one line each: the core's table of contents. What an op means, with shapes,
// dtypes and errors, is told by python/partune/ops/<family>.py.
#include "schema.h"

namespace partune {

// clang-format off
const Schema kSchemas[] = {
    // family sparse_adamw
    {"sparse_adamw", "sparse_adamw_(Tensor(a!)[] self, Tensor[] grads, Tensor[] crow_indices, Tensor[] col_indices, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] masters, Tensor[] state_steps, int[] parameter_ids, *, Tensor lr, float beta1, float beta2, float weight_decay, float eps, str eps_mode, bool maximize, str rounding, Tensor? seed=None, Tensor? offset=None, Tensor? grad_scale=None, Tensor? found_inf=None) -> ()"},
    {"sparse_adamw", "found_inf_(Tensor(a!) found_inf, Tensor[] grads, Tensor[] crow_indices, Tensor[] col_indices) -> ()"},
    {"sparse_adamw", "remap_(Tensor(a!)[] new_values, Tensor[] old_values, Tensor old_crow_indices, Tensor old_col_indices, Tensor new_crow_indices, Tensor new_col_indices) -> Tensor"},
    // family csr_entries
    {"csr_entries", "gather_csr_(Tensor(a!)[] values, Tensor[] matrices, Tensor[] crow_indices, Tensor[] col_indices) -> ()"},
    {"csr_entries", "scatter_csr_(Tensor(a!)[] matrices, Tensor[] values, Tensor[] crow_indices, Tensor[] col_indices) -> ()"},
    // family select
    {"select", "topk_csr(Tensor scores, int k, *, bool largest=True) -> (Tensor, Tensor)"},
    {"select", "threshold_csr(Tensor scores, float threshold, *, bool largest=True) -> (Tensor, Tensor)"},
    {"select", "topk_csr_factors(Tensor left, Tensor right, int k) -> (Tensor, Tensor)"},
    {"select", "random_scores(int rows, int columns, *, Tensor seed, Tensor step, int parameter_id) -> Tensor"},
    // family scale_shift
    {"scale_shift", "scale_shift(Tensor input, Tensor scale, Tensor? shift=None, Tensor? bias=None, *, str activation=\"none\", int channel_dim=-1) -> Tensor"},
    {"scale_shift", "scale_shift_(Tensor(a!) input, Tensor scale, Tensor? shift=None, Tensor? bias=None, *, int channel_dim=-1) -> ()"},
    {"scale_shift", "scale_shift_backward(Tensor grad, Tensor? saved, Tensor scale, Tensor? shift=None, Tensor? bias=None, *, str activation=\"none\", int channel_dim=-1, bool from_output=False, bool input_grad=True, bool scale_grad=True) -> (Tensor, Tensor, Tensor)"},
    {"scale_shift", "layer_norm_scale_shift(Tensor input, Tensor? weight, Tensor? bias, Tensor scale, Tensor? shift=None, *, float eps) -> (Tensor, Tensor, Tensor)"},
    {"scale_shift", "layer_norm_scale_shift_backward(Tensor grad, Tensor input, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, Tensor scale, *, bool input_grad=True, bool scale_grad=True) -> (Tensor, Tensor, Tensor)"},
    {"scale_shift", "rms_norm_scale_shift(Tensor input, Tensor? weight, Tensor scale, Tensor? shift=None, *, float eps) -> (Tensor, Tensor)"},
    {"scale_shift", "rms_norm_scale_shift_backward(Tensor grad, Tensor input, Tensor rstd, Tensor? weight, Tensor scale, *, bool input_grad=True, bool scale_grad=True) -> (Tensor, Tensor, Tensor)"},
    // family block_lora
    {"block_lora", "block_lora_(Tensor(a!)[] outputs, Tensor input, Tensor[] downs, Tensor[] ups, *, float[] scales, str share=\"input\", float dropout=0.0, Tensor? seed=None, Tensor? step=None, int layer_id=0) -> Tensor"},
    {"block_lora", "block_lora_backward_(Tensor(a!)? grad_input, Tensor(b!)[] grad_downs, Tensor(c!)[] grad_ups, Tensor[] grads, Tensor input, Tensor hidden, Tensor[] downs, Tensor[] ups, *, float[] scales, str share=\"input\", float dropout=0.0, Tensor? seed=None, Tensor? step=None, int layer_id=0, bool accumulate=False) -> ()"},
    // family half_mask
    {"half_mask", "half_adamw_(Tensor(a!)[] self, Tensor[] grads, Tensor[] live, Tensor[] ranks, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] masters, Tensor[] state_steps, int[] parameter_ids, int[] mask_ids, *, str level, Tensor lr, float beta1, float beta2, float weight_decay, float eps, str eps_mode, bool maximize, str rounding, Tensor? mask_seed=None, Tensor? seed=None, Tensor? offset=None, Tensor? grad_scale=None, Tensor? found_inf=None) -> ()"},
    {"half_mask", "random_mask(int count, *, Tensor mask_seed, int mask_id) -> Tensor"},
    {"half_mask", "mask_counts(Tensor mask, int count) -> Tensor"},
    // family sampled_grad
    {"sampled_grad", "sampled_grad_(Tensor(a!) values, Tensor grad, Tensor input, Tensor crow_indices, Tensor col_indices, *, str route) -> ()"},
};
// clang-format on
const int kSchemaCount = sizeof(kSchemas) / sizeof(kSchemas[0]);

}  // namespace partune
