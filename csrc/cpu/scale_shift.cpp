// Family scale_shift on the CPU, without norms. Work is split by the units that a fixed partition of the
// tensor has.
#include <torch/csrc/stable/library.h>

#include <memory>

#include "isa.h"
#include "scale_shift_vectors.h"

namespace partune {
namespace {

// How many of a tensor's units of work a thread takes at least.
int64_t unit_grain(const Tensor& tensor, int64_t units) {
  return units > 0 ? kScaleShiftGrain / (tensor.numel() / units + 1) + 1 : 1;
}

template <typename Real>
void run_forward(const ScaleShiftBodies<Real>& bodies, const ChannelLayout& layout, const Tensor& input,
                 const Tensor& output, const Tensor& scale, const OptionalTensor& shift,
                 const OptionalTensor& bias, Activation activation) {
  const WideVector<Real> scales(scale, layout.channels, Real(1)), shifts(shift, layout.channels, Real(0)),
      biases(bias, layout.channels, Real(0));
  const void* from = input.const_data_ptr();
  void* to = output.mutable_data_ptr();
  const ScaleShiftForward<Real> task{
      layout,        from,          to,         biases.data(),
      scales.data(), shifts.data(), activation, from != to && is_streamed(input)};
  const WorkUnits units = work_units(layout);
  const int64_t count = input.numel() > 0 ? units.rows * units.per_row : 0;
  torch::stable::parallel_for(0, count, unit_grain(input, count),
                              [&](int64_t begin, int64_t end) { bodies.forward(task, begin, end); });
}

void forward(const char* op, const Tensor& input, const Tensor& output, const Tensor& scale,
             const OptionalTensor& shift, const OptionalTensor& bias, Activation activation,
             const ChannelLayout& layout) {
  STD_TORCH_CHECK(input.is_cpu(), op, ": input must be on the CPU");
  check_scale(op, scale, shift, input, layout.channels);
  check_channels(op, "bias", bias, input, layout.channels);
  with_bodies(PARTUNE_CPU_TABLE(scale_shift_cpu), input, [&](const auto& bodies) {
    run_forward(bodies, layout, input, output, scale, shift, bias, activation);
  });
}

Tensor scale_shift(Tensor input, Tensor scale, OptionalTensor shift, OptionalTensor bias,
                   std::string activation, int64_t channel_dim) {
  const char* op = "scale_shift";
  const ChannelLayout layout = layout_of(op, "input", input, channel_dim);
  const Activation chosen = activation_of(op, activation);
  Tensor output = empty_output(input);
  forward(op, input, output, scale, shift, bias, chosen, layout);
  return output;
}

void scale_shift_(Tensor input, Tensor scale, OptionalTensor shift, OptionalTensor bias,
                  int64_t channel_dim) {
  const char* op = "scale_shift_";
  const ChannelLayout layout = layout_of(op, "input", input, channel_dim);
  forward(op, input, input, scale, shift, bias, Activation::kNone, layout);
}

struct BackwardArguments {
  const Tensor& grad;
  const OptionalTensor& saved;
  const Tensor& scale;
  const OptionalTensor &shift, &bias;
  Activation activation;
  bool from_output, input_grad, scale_grad;
};

template <typename Real>
ThreeTensors run_backward(const ScaleShiftBodies<Real>& bodies, const ChannelLayout& layout,
                          const BackwardArguments& a) {
  const int64_t channels = layout.channels;
  const WideVector<Real> scales(a.scale, channels, Real(1)), shifts(a.shift, channels, Real(0));
  WideVector<Real> addends(a.from_output ? a.shift : a.bias, channels, Real(0));
  if (a.from_output && a.shift) {
    Real* negated = addends.own(channels);
    for (int64_t i = 0; i < channels; ++i) negated[i] = -negated[i];
  }
  const WorkUnits units = work_units(layout);
  Tensor grad_input = a.input_grad ? empty_output(a.grad) : empty_vector(a.grad, 0);
  Tensor grad_scale = empty_vector(a.scale, a.scale_grad ? channels : 0);
  Tensor grad_shift = empty_vector(a.scale, a.scale_grad ? channels : 0);
  const std::unique_ptr<Real[]> partial(a.scale_grad ? new Real[size_t(units.rows * 2 * channels)] : nullptr);
  const ScaleShiftBackward<Real> task{layout,
                                      a.grad.const_data_ptr(),
                                      a.saved ? a.saved->const_data_ptr() : nullptr,
                                      a.input_grad ? grad_input.mutable_data_ptr() : nullptr,
                                      addends.data(),
                                      scales.data(),
                                      shifts.data(),
                                      partial.get(),
                                      a.activation,
                                      is_streamed(a.grad)};
  const int64_t count = a.input_grad || a.scale_grad ? units.rows * units.per_row : 0;
  torch::stable::parallel_for(0, count, unit_grain(a.grad, count),
                              [&](int64_t begin, int64_t end) { bodies.backward(task, begin, end); });
  if (a.scale_grad) {
    sum_partial_rows(bodies, {partial.get(), units.rows, channels, nullptr, nullptr,
                              a.from_output ? scales.data() : nullptr, grad_scale.mutable_data_ptr(),
                              grad_shift.mutable_data_ptr(), a.scale.element_size() == sizeof(Real)});
  }
  return {grad_input, grad_scale, grad_shift};
}

ThreeTensors scale_shift_backward(Tensor grad, OptionalTensor saved, Tensor scale, OptionalTensor shift,
                                  OptionalTensor bias, std::string activation, int64_t channel_dim,
                                  bool from_output, bool input_grad, bool scale_grad) {
  const char* op = "scale_shift_backward";
  STD_TORCH_CHECK(grad.is_cpu(), op, ": grad must be on the CPU");
  const ChannelLayout layout = layout_of(op, "grad", grad, channel_dim);
  const Activation chosen = activation_of(op, activation);
  check_backward(op, grad, saved, scale, shift, bias, layout.channels, chosen, from_output, scale_grad);
  return with_bodies(PARTUNE_CPU_TABLE(scale_shift_cpu), grad, [&](const auto& bodies) {
    return run_backward(bodies, layout,
                        {grad, saved, scale, shift, bias, chosen, from_output, input_grad, scale_grad});
  });
}

}  // namespace
}  // namespace partune

STABLE_TORCH_LIBRARY_IMPL(partune, CPU, library) {
  library.impl("scale_shift", TORCH_BOX(&partune::scale_shift));
  library.impl("scale_shift_", TORCH_BOX(&partune::scale_shift_));
  library.impl("scale_shift_backward", TORCH_BOX(&partune::scale_shift_backward));
}
