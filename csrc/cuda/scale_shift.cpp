// Family scale_shift on CUDA, without norms: checks, task, launch.
#include "bindings.h"
#include "scale_shift_launch.h"

namespace partune {
namespace {

void forward(const char* op, const Tensor& input, const Tensor& output, const Tensor& scale,
             const OptionalTensor& shift, const OptionalTensor& bias, Activation activation,
             const ChannelLayout& layout) {
  check_scale(op, scale, shift, input, layout.channels);
  check_channels(op, "bias", bias, input, layout.channels);
  const DeviceScope scope(input.get_device_index());
  const ScaleShiftTask task{
      layout,          input.const_data_ptr(), nullptr,          output.mutable_data_ptr(),
      vector_of(bias), vector_of(scale),       vector_of(shift), false,
      nullptr};
  check_launch(
      op, scale_shift_launchers(input).forward(task, activation, current_stream(input.get_device_index())));
}

}  // namespace

Tensor scale_shift_cuda(Tensor input, Tensor scale, OptionalTensor shift, OptionalTensor bias,
                        std::string activation, int64_t channel_dim) {
  const char* op = "scale_shift";
  const ChannelLayout layout = layout_of(op, "input", input, channel_dim);
  const Activation chosen = activation_of(op, activation);
  Tensor output = torch::stable::empty_like(input);
  forward(op, input, output, scale, shift, bias, chosen, layout);
  return output;
}

void scale_shift_cuda_(Tensor input, Tensor scale, OptionalTensor shift, OptionalTensor bias,
                       int64_t channel_dim) {
  const char* op = "scale_shift_";
  const ChannelLayout layout = layout_of(op, "input", input, channel_dim);
  forward(op, input, input, scale, shift, bias, Activation::kNone, layout);
}

ThreeTensors scale_shift_backward_cuda(Tensor grad, OptionalTensor saved, Tensor scale, OptionalTensor shift,
                                       OptionalTensor bias, std::string activation, int64_t channel_dim,
                                       bool from_output, bool input_grad, bool scale_grad) {
  const char* op = "scale_shift_backward";
  const ChannelLayout layout = layout_of(op, "grad", grad, channel_dim);
  const Activation chosen = activation_of(op, activation);
  check_backward(op, grad, saved, scale, shift, bias, layout.channels, chosen, from_output, scale_grad);
  const DeviceScope scope(grad.get_device_index());
  const cudaStream_t stream = current_stream(grad.get_device_index());
  const ScaleShiftLaunchers& launchers = scale_shift_launchers(grad);
  const Gradients grads(grad, scale, scale_shift_rows_of_sums(layout), input_grad, scale_grad);
  const ScaleShiftTask task{layout,
                            grad.const_data_ptr(),
                            saved ? saved->const_data_ptr() : nullptr,
                            input_grad ? grads.input.mutable_data_ptr() : nullptr,
                            vector_of(bias),
                            vector_of(scale),
                            vector_of(shift),
                            from_output,
                            grads.partial_data()};
  check_launch(op, launchers.backward(task, chosen, stream));
  grads.sum_columns(op, launchers, std::nullopt, std::nullopt,
                    from_output ? OptionalTensor(scale) : std::nullopt, stream);
  return {grads.input, grads.scale, grads.shift};
}

}  // namespace partune
