// Checks for memory safety, shared by the CPU and the CUDA bindings. The messages that users see come
// from python/partune/ops; whoever calls torch.ops.partune directly is caught here.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace partune {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using TensorList = std::vector<Tensor>;

inline void check_dtype(const char* op, const char* name, const Tensor& tensor,
                        std::initializer_list<ScalarType> wanted) {
  const ScalarType dtype = tensor.scalar_type();
  for (ScalarType one : wanted) {
    if (dtype == one) return;
  }
  STD_TORCH_CHECK(false, op, ": ", name, " has dtype ", torch::headeronly::toString(dtype),
                  ", which this kernel does not take");
}

// A contiguous 1-D tensor of a known length on a known device.
inline void check_vector(const char* op, const char* name, const Tensor& tensor, const Tensor& like,
                         std::initializer_list<ScalarType> dtypes, int64_t length) {
  check_dtype(op, name, tensor, dtypes);
  STD_TORCH_CHECK(tensor.device() == like.device(), op, ": ", name, " must be on the parameter's device");
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.numel() == length && tensor.is_contiguous(), op, ": ", name,
                  " must be a contiguous vector of ", length, " elements, got ", tensor.numel());
}

inline void check_scalar(const char* op, const char* name, const Tensor& tensor, const Tensor& like,
                         std::initializer_list<ScalarType> dtypes) {
  check_dtype(op, name, tensor, dtypes);
  STD_TORCH_CHECK(tensor.device() == like.device(), op, ": ", name, " must be on the parameter's device");
  STD_TORCH_CHECK(tensor.numel() == 1, op, ": ", name, " must hold one number, got ", tensor.numel());
}

inline bool chooses(const char* op, const char* name, std::string_view got, std::string_view yes,
                    std::string_view no) {
  STD_TORCH_CHECK(got == yes || got == no, op, ": ", name, " must be '", yes, "' or '", no, "', got '", got,
                  "'");
  return got == yes;
}

inline void check_lengths(const char* op, size_t wanted, std::initializer_list<size_t> lengths) {
  for (size_t length : lengths) {
    STD_TORCH_CHECK(length == wanted, op, ": all lists must have one entry per parameter (", wanted,
                    "), got one of ", length);
  }
}

// A tensor seen as [rows, columns], with strides in elements: 2-D with any strides, or contiguous.
struct MatrixView {
  int64_t rows, columns, row_stride, column_stride;
};

inline MatrixView matrix_view(const char* op, const char* name, const Tensor& tensor, int64_t rows) {
  const int64_t numel = tensor.numel();
  if (tensor.dim() == 2 && tensor.size(0) == rows) {
    return {rows, tensor.size(1), tensor.stride(0), tensor.stride(1)};
  }
  STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", name, " must be 2-D or contiguous");
  STD_TORCH_CHECK(rows > 0 ? numel % rows == 0 : numel == 0, op, ": ", name, " with ", numel,
                  " elements can't be seen as ", rows, " rows");
  const int64_t columns = rows > 0 ? numel / rows : 0;
  return {rows, columns, columns, 1};
}

}  // namespace partune
