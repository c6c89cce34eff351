// Family scale_shift on CUDA, after a norm: checks, task, launch.
#include <vector>

#include "bindings.h"
#include "scale_shift_launch.h"

namespace partune {
namespace {

Tensor empty_rows(const Tensor& input) {
  std::vector<int64_t> sizes;
  for (int64_t dim = 0; dim + 1 < input.dim(); ++dim) sizes.push_back(input.size(dim));
  return torch::stable::empty(sizes, computing_type(input), std::nullopt, input.device());
}

struct NormVectors {
  const OptionalTensor &weight, &bias;
  const Tensor& scale;
  const OptionalTensor& shift;
};

NormTask task_of(const char* op, const ChannelLayout& layout, const Tensor& input,
                 const NormVectors& vectors) {
  check_scale(op, vectors.scale, vectors.shift, input, layout.channels);
  check_channels(op, "weight", vectors.weight, input, layout.channels);
  check_channels(op, "bias", vectors.bias, input, layout.channels);
  NormTask task{};
  task.rows = layout.outer;
  task.channels = layout.channels;
  task.input = input.const_data_ptr();
  task.weight = vector_of(vectors.weight);
  task.bias = vector_of(vectors.bias);
  task.scale = vector_of(vectors.scale);
  task.shift = vector_of(vectors.shift);
  return task;
}

Tensor forward(const char* op, const Tensor& input, const NormVectors& vectors, double eps,
               const OptionalTensor& mean, const Tensor& rstd) {
  const ChannelLayout layout = layout_of(op, "input", input, -1);
  NormTask task = task_of(op, layout, input, vectors);
  const DeviceScope scope(input.get_device_index());
  Tensor output = torch::stable::empty_like(input);
  task.output = output.mutable_data_ptr();
  task.mean = mean ? mean->mutable_data_ptr() : nullptr;
  task.rstd = rstd.mutable_data_ptr();
  check_launch(
      op, scale_shift_launchers(input).norm_forward(task, eps, current_stream(input.get_device_index())));
  return output;
}

ThreeTensors backward(const char* op, const Tensor& grad, const Tensor& input, const OptionalTensor& mean,
                      const Tensor& rstd, const NormVectors& vectors, bool input_grad, bool scale_grad) {
  const ChannelLayout layout = layout_of(op, "grad", grad, -1);
  check_like(op, "input", input, grad);
  if (mean) check_statistic(op, "mean", *mean, grad, layout.outer);
  check_statistic(op, "rstd", rstd, grad, layout.outer);
  NormTask task = task_of(op, layout, input, vectors);
  const DeviceScope scope(grad.get_device_index());
  const cudaStream_t stream = current_stream(grad.get_device_index());
  const ScaleShiftLaunchers& launchers = scale_shift_launchers(grad);
  task.block_rows = scale_shift_norm_block_rows(task.rows);
  const int64_t blocks = (task.rows + task.block_rows - 1) / task.block_rows;
  const Gradients grads(grad, vectors.scale, blocks, input_grad, scale_grad);
  task.grad = grad.const_data_ptr();
  task.output = input_grad ? grads.input.mutable_data_ptr() : nullptr;
  task.mean = mean ? mean->mutable_data_ptr() : nullptr;
  task.rstd = rstd.mutable_data_ptr();
  task.partial = grads.partial_data();
  check_launch(op, launchers.norm_backward(task, stream));
  grads.sum_columns(op, launchers, vectors.weight, vectors.bias, std::nullopt, stream);
  return {grads.input, grads.scale, grads.shift};
}

}  // namespace

ThreeTensors layer_norm_scale_shift_cuda(Tensor input, OptionalTensor weight, OptionalTensor bias,
                                         Tensor scale, OptionalTensor shift, double eps) {
  Tensor mean = empty_rows(input), rstd = empty_rows(input);
  Tensor output = forward("layer_norm_scale_shift", input, {weight, bias, scale, shift}, eps, mean, rstd);
  return {output, mean, rstd};
}

TwoTensors rms_norm_scale_shift_cuda(Tensor input, OptionalTensor weight, Tensor scale, OptionalTensor shift,
                                     double eps) {
  Tensor rstd = empty_rows(input);
  Tensor output =
      forward("rms_norm_scale_shift", input, {weight, std::nullopt, scale, shift}, eps, std::nullopt, rstd);
  return {output, rstd};
}

ThreeTensors layer_norm_scale_shift_backward_cuda(Tensor grad, Tensor input, Tensor mean, Tensor rstd,
                                                  OptionalTensor weight, OptionalTensor bias, Tensor scale,
                                                  bool input_grad, bool scale_grad) {
  return backward("layer_norm_scale_shift_backward", grad, input, mean, rstd,
                  {weight, bias, scale, std::nullopt}, input_grad, scale_grad);
}

ThreeTensors rms_norm_scale_shift_backward_cuda(Tensor grad, Tensor input, Tensor rstd, OptionalTensor weight,
                                                Tensor scale, bool input_grad, bool scale_grad) {
  return backward("rms_norm_scale_shift_backward", grad, input, std::nullopt, rstd,
                  {weight, std::nullopt, scale, std::nullopt}, input_grad, scale_grad);
}

}  // namespace partune
