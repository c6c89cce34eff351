// From tensors to pointers, and the route over panels: what the CPU and the CUDA binding of family
// sampled_grad share.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <string>

#include "../kernels/sampled_grad.h"
#include "checks.h"

namespace partune {

// A matrix [tokens, columns] whose rows are contiguous.
struct Factor {
  const void* data;
  int64_t columns, stride;
};

struct SampledGradCall {
  Factor grad, input;
  int64_t tokens;
  CsrView csr;
  void* values;
  bool panels;
  int64_t side;  // of a block of entries: 1 unless the route is "blocks"
};

inline Factor factor_of(const char* op, const char* name, const Tensor& tensor, const Tensor& values) {
  const bool wide = values.scalar_type() == ScalarType::Double;
  if (wide) {
    check_dtype(op, name, tensor, {ScalarType::Double});
  } else {
    check_dtype(op, name, tensor, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  }
  STD_TORCH_CHECK(tensor.device() == values.device(), op, ": ", name, " must be on the device of values");
  STD_TORCH_CHECK(tensor.dim() == 2, op, ": ", name, " must be a matrix");
  const int64_t rows = tensor.size(0), columns = tensor.size(1);
  STD_TORCH_CHECK(tensor.is_contiguous() || (tensor.stride(1) == 1 && tensor.stride(0) >= columns), op, ": ",
                  name, " must have contiguous rows");
  return {tensor.const_data_ptr(), columns, rows > 1 ? tensor.stride(0) : columns};
}

// That sizes are of whole blocks: then no block of a CSR, be its entries blocks or not, reaches beyond.
inline void check_blocks(const char* op, const SampledGradCall& call) {
  STD_TORCH_CHECK(call.grad.columns % call.side == 0 && call.input.columns % call.side == 0, op,
                  ": for route 'blocks' grad and input must have columns by ", call.side, ", got ",
                  call.grad.columns, " and ", call.input.columns);
  STD_TORCH_CHECK(call.csr.nnz % (call.side * call.side) == 0, op,
                  ": for route 'blocks' col_indices must have entries by ", call.side * call.side, ", got ",
                  call.csr.nnz);
}

inline SampledGradCall sampled_grad_call(const char* op, Tensor& values, const Tensor& grad,
                                         const Tensor& input, const Tensor& crow_indices,
                                         const Tensor& col_indices, const std::string& route) {
  check_dtype(op, "values", values, {ScalarType::Float, ScalarType::Double});
  SampledGradCall call{};
  call.side = route == "blocks" ? kBlockSide : 1;
  call.panels = route == "panels";
  STD_TORCH_CHECK(call.panels || call.side > 1 || route == "sampled", op,
                  ": route must be 'sampled', 'panels' or 'blocks', got '", route, "'");
  call.grad = factor_of(op, "grad", grad, values);
  call.input = factor_of(op, "input", input, values);
  check_dtype(op, "input", input, {grad.scalar_type()});
  call.tokens = grad.size(0);
  STD_TORCH_CHECK(input.size(0) == call.tokens, op, ": grad has ", call.tokens, " tokens, input ",
                  input.size(0));
  check_vector(op, "crow_indices", crow_indices, values, {ScalarType::Long}, call.grad.columns + 1);
  check_vector(op, "col_indices", col_indices, values, {ScalarType::Int}, col_indices.numel());
  check_vector(op, "values", values, values, {values.scalar_type()}, col_indices.numel());
  call.csr = {crow_indices.const_data_ptr<int64_t>(), col_indices.const_data_ptr<int32_t>(),
              call.grad.columns, col_indices.numel()};
  check_blocks(op, call);
  call.values = values.mutable_data_ptr();
  return call;
}

// out [rows, columns] = left @ right, by torch.
inline void multiply_into(Tensor& out, const Tensor& left, const Tensor& right) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(left), torch::stable::detail::from(right),
                                    torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  out = torch::stable::detail::to<Tensor>(stack[0]);
}

// The dense product a panel of rows at a time, in one workspace of about `bytes`: compact(panel, first row,
// last row) takes each panel's entries before the next is formed.
template <typename Compact>
void for_panels(const Tensor& grad, const Tensor& input, int64_t bytes, const Compact& compact) {
  const int64_t rows = grad.size(1), columns = input.size(1);
  const int64_t row_bytes = std::max<int64_t>(columns * int64_t(grad.element_size()), 1);
  const int64_t panel_rows = std::min(rows, std::max<int64_t>(64, bytes / row_bytes / 64 * 64));
  Tensor workspace =
      torch::stable::empty({panel_rows, columns}, grad.scalar_type(), std::nullopt, grad.device());
  for (int64_t first = 0; first < rows; first += panel_rows) {
    const int64_t count = std::min(panel_rows, rows - first);
    Tensor slice = grad, panel = workspace;
    slice = torch::stable::transpose(torch::stable::narrow(slice, 1, first, count), 0, 1);
    if (count < panel_rows) panel = torch::stable::narrow(panel, 0, 0, count);
    multiply_into(panel, slice, input);
    compact(panel.const_data_ptr(), first, first + count);
  }
}

}  // namespace partune
