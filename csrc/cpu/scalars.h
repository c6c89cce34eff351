// Reading 0-d tensors, which hold what must not be baked into a captured graph.
#pragma once
#include "../binding/checks.h"

namespace partune {

inline double scalar_value(const char* op, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.numel() == 1, op, ": ", name, " must be one number on the CPU");
  if (tensor.scalar_type() == ScalarType::Double) return *tensor.const_data_ptr<double>();
  check_dtype(op, name, tensor, {ScalarType::Float});
  return double(*tensor.const_data_ptr<float>());
}

inline int64_t integer_value(const char* op, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.numel() == 1, op, ": ", name, " must be one number on the CPU");
  check_dtype(op, name, tensor, {ScalarType::Long});
  return *tensor.const_data_ptr<int64_t>();
}

}  // namespace partune
