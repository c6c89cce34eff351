// Family scale_shift on the CPU, after a norm: forward by rows, backward by blocks of rows.
#include <torch/csrc/stable/library.h>

#include <memory>

#include "isa.h"
#include "scale_shift_vectors.h"

namespace partune {
namespace {

int64_t row_grain(int64_t channels) { return kScaleShiftGrain / (channels + 1) + 1; }

// The rows that a norm's statistics are of, one number each.
Tensor empty_rows(const Tensor& input) {
  std::vector<int64_t> sizes;
  for (int64_t dim = 0; dim + 1 < input.dim(); ++dim) sizes.push_back(input.size(dim));
  const ScalarType dtype = input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return torch::stable::empty(sizes, dtype, std::nullopt, input.device());
}

struct NormArguments {
  const Tensor& input;
  const OptionalTensor &weight, &bias;
  const Tensor& scale;
  const OptionalTensor& shift;
  double eps;
};

template <typename Real>
void run_forward(const NormBodies<Real>& bodies, const NormArguments& a, const ChannelLayout& layout,
                 const Tensor& output, const OptionalTensor& mean, const Tensor& rstd) {
  const int64_t channels = layout.channels;
  const WideVector<Real> bias(a.bias, channels, Real(0)), scale(a.scale, channels, Real(1));
  WideVector<Real> gain(a.weight, channels, Real(1)), offset(a.shift, channels, Real(0));
  Real *gains = gain.own(channels), *offsets = offset.own(channels);
  for (int64_t i = 0; i < channels; ++i) {
    gains[i] *= scale.data()[i];
    offsets[i] += bias.data()[i] * scale.data()[i];
  }
  const NormForward<Real> task{channels,
                               a.input.const_data_ptr(),
                               output.mutable_data_ptr(),
                               gains,
                               offsets,
                               mean ? static_cast<Real*>(mean->mutable_data_ptr()) : nullptr,
                               static_cast<Real*>(rstd.mutable_data_ptr()),
                               Real(a.eps),
                               is_streamed(a.input)};
  torch::stable::parallel_for(0, layout.outer, row_grain(channels),
                              [&](int64_t begin, int64_t end) { bodies.forward(task, begin, end); });
}

Tensor forward(const char* op, const NormArguments& a, const OptionalTensor& mean, const Tensor& rstd) {
  STD_TORCH_CHECK(a.input.is_cpu(), op, ": input must be on the CPU");
  const ChannelLayout layout = layout_of(op, "input", a.input, -1);
  check_scale(op, a.scale, a.shift, a.input, layout.channels);
  check_channels(op, "weight", a.weight, a.input, layout.channels);
  check_channels(op, "bias", a.bias, a.input, layout.channels);
  Tensor output = empty_output(a.input);
  with_bodies(PARTUNE_CPU_TABLE(scale_shift_norm_cpu), a.input,
              [&](const auto& bodies) { run_forward(bodies, a, layout, output, mean, rstd); });
  return output;
}

ThreeTensors layer_norm_scale_shift(Tensor input, OptionalTensor weight, OptionalTensor bias, Tensor scale,
                                    OptionalTensor shift, double eps) {
  Tensor mean = empty_rows(input), rstd = empty_rows(input);
  Tensor output = forward("layer_norm_scale_shift", {input, weight, bias, scale, shift, eps}, mean, rstd);
  return {output, mean, rstd};
}

TwoTensors rms_norm_scale_shift(Tensor input, OptionalTensor weight, Tensor scale, OptionalTensor shift,
                                double eps) {
  Tensor rstd = empty_rows(input);
  Tensor output =
      forward("rms_norm_scale_shift", {input, weight, std::nullopt, scale, shift, eps}, std::nullopt, rstd);
  return {output, rstd};
}

struct NormBackwardArguments {
  const Tensor &grad, &input;
  const OptionalTensor& mean;
  const Tensor& rstd;
  const OptionalTensor &weight, &bias;
  const Tensor& scale;
  bool input_grad, scale_grad;
};

template <typename Real>
ThreeTensors run_backward(const NormBodies<Real>& bodies, const ScaleShiftBodies<Real>& sums,
                          const NormBackwardArguments& a, const ChannelLayout& layout) {
  const int64_t rows = layout.outer, channels = layout.channels;
  const WideVector<Real> weight(a.weight, channels, Real(1)), bias(a.bias, channels, Real(0));
  WideVector<Real> gain(a.scale, channels, Real(1));
  if (a.weight) {
    Real* product = gain.own(channels);
    for (int64_t i = 0; i < channels; ++i) product[i] *= weight.data()[i];
  }
  Tensor grad_input = a.input_grad ? empty_output(a.grad) : empty_vector(a.grad, 0);
  Tensor grad_scale = empty_vector(a.scale, a.scale_grad ? channels : 0);
  Tensor grad_shift = empty_vector(a.scale, a.scale_grad ? channels : 0);
  const int64_t blocks = (rows + kSumRows - 1) / kSumRows;
  const std::unique_ptr<Real[]> partial(a.scale_grad ? new Real[size_t(blocks * 2 * channels)] : nullptr);
  const NormBackward<Real> task{rows,
                                channels,
                                a.grad.const_data_ptr(),
                                a.input.const_data_ptr(),
                                a.mean ? static_cast<const Real*>(a.mean->const_data_ptr()) : nullptr,
                                static_cast<const Real*>(a.rstd.const_data_ptr()),
                                gain.data(),
                                a.input_grad ? grad_input.mutable_data_ptr() : nullptr,
                                partial.get(),
                                is_streamed(a.grad)};
  torch::stable::parallel_for(0, blocks, row_grain(channels * kSumRows),
                              [&](int64_t begin, int64_t end) { bodies.backward(task, begin, end); });
  if (a.scale_grad) {
    sum_partial_rows(sums, {partial.get(), blocks, channels, a.weight ? weight.data() : nullptr,
                            a.bias ? bias.data() : nullptr, nullptr, grad_scale.mutable_data_ptr(),
                            grad_shift.mutable_data_ptr(), a.scale.element_size() == sizeof(Real)});
  }
  return {grad_input, grad_scale, grad_shift};
}

ThreeTensors backward(const char* op, const NormBackwardArguments& a) {
  STD_TORCH_CHECK(a.grad.is_cpu(), op, ": grad must be on the CPU");
  const ChannelLayout layout = layout_of(op, "grad", a.grad, -1);
  check_like(op, "input", a.input, a.grad);
  if (a.mean) check_statistic(op, "mean", *a.mean, a.grad, layout.outer);
  check_statistic(op, "rstd", a.rstd, a.grad, layout.outer);
  check_scale(op, a.scale, std::nullopt, a.grad, layout.channels);
  check_channels(op, "weight", a.weight, a.grad, layout.channels);
  check_channels(op, "bias", a.bias, a.grad, layout.channels);
  const ScaleShiftNormCpu& norms = PARTUNE_CPU_TABLE(scale_shift_norm_cpu);
  const ScaleShiftCpu& sums = PARTUNE_CPU_TABLE(scale_shift_cpu);
  switch (a.grad.scalar_type()) {
    case ScalarType::Double:
      return run_backward(norms.float64, sums.float64, a, layout);
    case ScalarType::Float:
      return run_backward(norms.float32, sums.float32, a, layout);
    case ScalarType::BFloat16:
      return run_backward(norms.bfloat16, sums.bfloat16, a, layout);
    default:
      return run_backward(norms.half, sums.half, a, layout);
  }
}

ThreeTensors layer_norm_scale_shift_backward(Tensor grad, Tensor input, Tensor mean, Tensor rstd,
                                             OptionalTensor weight, OptionalTensor bias, Tensor scale,
                                             bool input_grad, bool scale_grad) {
  return backward("layer_norm_scale_shift_backward",
                  {grad, input, mean, rstd, weight, bias, scale, input_grad, scale_grad});
}

ThreeTensors rms_norm_scale_shift_backward(Tensor grad, Tensor input, Tensor rstd, OptionalTensor weight,
                                           Tensor scale, bool input_grad, bool scale_grad) {
  return backward("rms_norm_scale_shift_backward",
                  {grad, input, std::nullopt, rstd, weight, std::nullopt, scale, input_grad, scale_grad});
}

}  // namespace
}  // namespace partune

STABLE_TORCH_LIBRARY_IMPL(partune, CPU, library) {
  library.impl("layer_norm_scale_shift", TORCH_BOX(&partune::layer_norm_scale_shift));
  library.impl("layer_norm_scale_shift_backward", TORCH_BOX(&partune::layer_norm_scale_shift_backward));
  library.impl("rms_norm_scale_shift", TORCH_BOX(&partune::rms_norm_scale_shift));
  library.impl("rms_norm_scale_shift_backward", TORCH_BOX(&partune::rms_norm_scale_shift_backward));
}
