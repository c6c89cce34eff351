// What the two CUDA bindings of family scale_shift share: vectors, and the sum of partial sums.
#pragma once
#include <torch/csrc/stable/ops.h>

#include "../binding/scale_shift.h"
#include "device.h"
#include "launchers.h"

namespace partune {

inline const ScaleShiftLaunchers& scale_shift_launchers(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return scale_shift_float64;
    case ScalarType::Float:
      return scale_shift_float32;
    case ScalarType::BFloat16:
      return scale_shift_bfloat16;
    default:
      return scale_shift_half;
  }
}

inline ScalarType computing_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline ChannelVector vector_of(const OptionalTensor& vector) {
  if (!vector) return {nullptr, false};
  return {vector->const_data_ptr(), vector->element_size() >= 4};
}

inline Tensor empty_on(const Tensor& like, int64_t size, ScalarType dtype) {
  return torch::stable::empty({size}, dtype, std::nullopt, like.device());
}

// What a backward gives; vectors and partial sums only where they are wanted.
struct Gradients {
  Tensor input, scale, shift, partial;

  Gradients(const Tensor& grad, const Tensor& scales, int64_t sum_rows, bool input_grad, bool scale_grad)
      : input(input_grad ? torch::stable::empty_like(grad) : empty_on(grad, 0, grad.scalar_type())),
        scale(empty_on(scales, scale_grad ? scales.numel() : 0, scales.scalar_type())),
        shift(empty_on(scales, scale_grad ? scales.numel() : 0, scales.scalar_type())),
        partial(empty_on(grad, scale_grad ? sum_rows * 2 * scales.numel() : 0, computing_type(grad))),
        sum_rows_(sum_rows),
        scale_grad_(scale_grad) {}

  void* partial_data() const { return scale_grad_ ? partial.mutable_data_ptr() : nullptr; }

  // Scale's gradient is (sum 0·factor + sum 1·offset)/divisor.
  void sum_columns(const char* op, const ScaleShiftLaunchers& launchers, const OptionalTensor& factor,
                   const OptionalTensor& offset, const OptionalTensor& divisor, cudaStream_t stream) const {
    if (!scale_grad_) return;
    const ColumnSumsTask task{partial.const_data_ptr(),
                              sum_rows_,
                              scale.numel(),
                              vector_of(factor),
                              vector_of(offset),
                              vector_of(divisor),
                              scale.mutable_data_ptr(),
                              shift.mutable_data_ptr(),
                              scale.element_size() >= 4};
    check_launch(op, launchers.sum_columns(task, stream));
  }

 private:
  int64_t sum_rows_;
  bool scale_grad_;
};

}  // namespace partune
