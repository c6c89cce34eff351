// From lists of tensors to lists of matrices: what the CPU and the CUDA binding of family
// sparse_adamw share.
#pragma once
#include <string>
#include <vector>

#include "../kernels/sparse_adamw.h"
#include "checks.h"

namespace partune {

inline SparseAdamWTypes types_of(const char* op, const Tensor& weight, const Tensor& grad,
                                 const Tensor& moment) {
  const ScalarType dtype = weight.scalar_type();
  const bool same = grad.scalar_type() == dtype;
  if (!same) check_dtype(op, "grads", grad, {ScalarType::Float});
  const bool rounded_state = dtype != ScalarType::Double && moment.scalar_type() == ScalarType::BFloat16;
  check_dtype(op, "exp_avgs", moment,
              {dtype == ScalarType::Double ? ScalarType::Double
               : rounded_state             ? ScalarType::BFloat16
                                           : ScalarType::Float});
  switch (dtype) {
    case ScalarType::Double:
      STD_TORCH_CHECK(same, op, ": grads of float64 parameters must be float64");
      return kFloat64;
    case ScalarType::Float:
      return rounded_state ? kFloat32StateBFloat16 : kFloat32;
    case ScalarType::BFloat16:
      if (same) return rounded_state ? kBFloat16StateBFloat16 : kBFloat16;
      return rounded_state ? kBFloat16GradFloat32StateBFloat16 : kBFloat16GradFloat32;
    case ScalarType::Half:
      if (same) return rounded_state ? kHalfStateBFloat16 : kHalf;
      return rounded_state ? kHalfGradFloat32StateBFloat16 : kHalfGradFloat32;
    default:
      STD_TORCH_CHECK(false, op, ": parameters must be float64, float32, bfloat16 or float16");
  }
}

inline bool same_layout(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != b.size(d)) return false;
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

// Whether the elements of a tensor are exactly its first numel storage positions.
inline bool is_dense(const Tensor& tensor) {
  int64_t span = 1;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) > 1) {
      if (tensor.stride(d) <= 0) return false;
      span += (tensor.size(d) - 1) * tensor.stride(d);
    }
  }
  return tensor.numel() == 0 || span == tensor.numel();
}

// Gradient and CSR of one parameter. Without a parameter (found_inf_) the gradient tells the shape.
inline SparseAdamWMatrix pack_gradient(const char* op, const Tensor& shape, const Tensor& grad,
                                       const Tensor& crow_indices, const Tensor& col_indices) {
  SparseAdamWMatrix m{};
  m.grad = grad.const_data_ptr();
  m.nnz = col_indices.numel();
  if (crow_indices.numel() == 0) {
    STD_TORCH_CHECK(m.nnz == 0, op, ": col_indices without crow_indices");
    STD_TORCH_CHECK(same_layout(shape, grad) && is_dense(shape), op,
                    ": a dense parameter and its gradient must have the same dense layout");
    m.rows = 1;
    m.columns = m.nnz = shape.numel();
    m.weight_column_stride = m.grad_column_stride = 1;
    m.weight_row_stride = m.grad_row_stride = m.columns;
    return m;
  }
  check_vector(op, "crow_indices", crow_indices, shape, {ScalarType::Long}, crow_indices.numel());
  check_vector(op, "col_indices", col_indices, shape, {ScalarType::Int}, m.nnz);
  m.rows = crow_indices.numel() - 1;
  m.crow_indices = crow_indices.const_data_ptr<int64_t>();
  m.col_indices = col_indices.const_data_ptr<int32_t>();
  m.grad_is_compact = grad.dim() == 1;
  if (m.grad_is_compact) {
    check_vector(op, "compact grads", grad, shape, {grad.scalar_type()}, m.nnz);
  } else {
    const MatrixView view = matrix_view(op, "grads", grad, m.rows);
    m.columns = view.columns;
    m.grad_row_stride = view.row_stride;
    m.grad_column_stride = view.column_stride;
  }
  return m;
}

inline SparseAdamWMatrix pack_matrix(const char* op, const Tensor& weight, const Tensor& grad,
                                     const Tensor& crow_indices, const Tensor& col_indices,
                                     const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor* master,
                                     const Tensor& state_step, int64_t parameter_id) {
  STD_TORCH_CHECK(grad.device() == weight.device(), op, ": grads must be on the parameter's device");
  SparseAdamWMatrix m = pack_gradient(op, weight, grad, crow_indices, col_indices);
  m.weight = weight.mutable_data_ptr();
  if (m.crow_indices) {
    const MatrixView view = matrix_view(op, "self", weight, m.rows);
    STD_TORCH_CHECK(m.grad_is_compact || m.columns == view.columns, op,
                    ": grads and self must have the same shape");
    m.columns = view.columns;
    m.weight_row_stride = view.row_stride;
    m.weight_column_stride = view.column_stride;
    for (const Tensor* moment : {&exp_avg, &exp_avg_sq}) {
      check_vector(op, "exp_avgs and exp_avg_sqs", *moment, weight, {exp_avg.scalar_type()}, m.nnz);
    }
  } else {
    for (const Tensor* moment : {&exp_avg, &exp_avg_sq}) {
      check_dtype(op, "exp_avgs and exp_avg_sqs", *moment, {exp_avg.scalar_type()});
      STD_TORCH_CHECK(same_layout(*moment, weight) && moment->device() == weight.device(), op,
                      ": the moments of a dense parameter must have its layout");
    }
  }
  m.exp_avg = exp_avg.mutable_data_ptr();
  m.exp_avg_sq = exp_avg_sq.mutable_data_ptr();
  if (master) {
    check_dtype(op, "masters", *master, {ScalarType::Float});
    STD_TORCH_CHECK(master->numel() == m.nnz && same_layout(*master, exp_avg), op,
                    ": masters must have the moments' layout");
    STD_TORCH_CHECK(master->device() == weight.device(), op, ": masters must be on the parameter's device");
    m.master = master->mutable_data_ptr<float>();
  }
  check_scalar(op, "state_steps", state_step, weight, {ScalarType::Float});
  m.state_step = state_step.const_data_ptr<float>();
  m.parameter_id = uint32_t(parameter_id);
  return m;
}

// The gradients of found_inf_, each of any floating dtype.
inline std::vector<SparseAdamWMatrix> pack_gradients(const char* op, const TensorList& grads,
                                                     const TensorList& crow_indices,
                                                     const TensorList& col_indices) {
  check_lengths(op, grads.size(), {crow_indices.size(), col_indices.size()});
  std::vector<SparseAdamWMatrix> matrices;
  for (size_t i = 0; i < grads.size(); ++i) {
    check_dtype(op, "grads", grads[i],
                {ScalarType::Double, ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
    matrices.push_back(pack_gradient(op, grads[i], grads[i], crow_indices[i], col_indices[i]));
  }
  return matrices;
}

// Two CSRs of one shape, and what is to be carried from the old one to the new one.
struct RemapArguments {
  CsrPair csrs;
  std::vector<RemapValues> values;
};

inline RemapArguments pack_remap(const char* op, const TensorList& new_values, const TensorList& old_values,
                                 const Tensor& old_crow_indices, const Tensor& old_col_indices,
                                 const Tensor& new_crow_indices, const Tensor& new_col_indices) {
  check_lengths(op, new_values.size(), {old_values.size()});
  const int64_t old_nnz = old_col_indices.numel(), new_nnz = new_col_indices.numel();
  const int64_t rows = new_crow_indices.numel() - 1;
  STD_TORCH_CHECK(rows >= 0, op, ": new_crow_indices must not be empty");
  check_vector(op, "old_crow_indices", old_crow_indices, new_crow_indices, {ScalarType::Long}, rows + 1);
  check_vector(op, "new_crow_indices", new_crow_indices, new_crow_indices, {ScalarType::Long}, rows + 1);
  check_vector(op, "old_col_indices", old_col_indices, new_crow_indices, {ScalarType::Int}, old_nnz);
  check_vector(op, "new_col_indices", new_col_indices, new_crow_indices, {ScalarType::Int}, new_nnz);
  RemapArguments arguments;
  arguments.csrs = {old_crow_indices.const_data_ptr<int64_t>(),
                    new_crow_indices.const_data_ptr<int64_t>(),
                    old_col_indices.const_data_ptr<int32_t>(),
                    new_col_indices.const_data_ptr<int32_t>(),
                    rows,
                    new_nnz};
  for (size_t i = 0; i < new_values.size(); ++i) {
    const auto dtypes = {ScalarType::Double, ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
    check_vector(op, "new_values", new_values[i], new_crow_indices, dtypes, new_nnz);
    check_vector(op, "old_values", old_values[i], new_crow_indices, {new_values[i].scalar_type()}, old_nnz);
    arguments.values.push_back({old_values[i].const_data_ptr(), new_values[i].mutable_data_ptr(),
                                int(new_values[i].element_size())});
  }
  return arguments;
}

template <typename Real>
AdamWHyperparameters<Real> hyperparameters_of(const char* op, double beta1, double beta2, double weight_decay,
                                              double eps, const std::string& eps_mode, bool maximize,
                                              const std::string& rounding) {
  return {Real(beta1),
          Real(1 - beta1),
          Real(beta2),
          Real(1 - beta2),
          Real(weight_decay),
          Real(eps),
          chooses(op, "eps_mode", eps_mode, "corrected", "uncorrected"),
          maximize,
          chooses(op, "rounding", rounding, "stochastic", "nearest")};
}

struct SparseAdamWArguments {
  const TensorList &self, &grads, &crow_indices, &col_indices, &exp_avgs, &exp_avg_sqs, &masters,
      &state_steps;
  const std::vector<int64_t>& parameter_ids;
};

struct SparseAdamWList {
  std::vector<SparseAdamWMatrix> matrices;
  std::vector<SparseAdamWTypes> types;
  bool draws;  // something is rounded stochastically
};

// Whether a step rounds a parameter's weights or moments stochastically.
inline bool rounds_stochastically(const char* op, const Tensor& weight, const Tensor& moment, bool has_master,
                                  bool stochastic) {
  const ScalarType dtype = weight.scalar_type();
  const bool rounded = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  STD_TORCH_CHECK(rounded || !has_master, op, ": masters are for bfloat16 and float16 parameters");
  return (rounded && !has_master && stochastic) || moment.scalar_type() == ScalarType::BFloat16;
}

inline SparseAdamWList pack_list(const char* op, const SparseAdamWArguments& a, bool stochastic) {
  const size_t count = a.self.size();
  check_lengths(op, count,
                {a.grads.size(), a.crow_indices.size(), a.col_indices.size(), a.exp_avgs.size(),
                 a.exp_avg_sqs.size(), a.state_steps.size(), a.parameter_ids.size()});
  if (!a.masters.empty()) check_lengths(op, count, {a.masters.size()});
  SparseAdamWList list{};
  for (size_t i = 0; i < count; ++i) {
    list.types.push_back(types_of(op, a.self[i], a.grads[i], a.exp_avgs[i]));
    list.draws |= rounds_stochastically(op, a.self[i], a.exp_avgs[i], !a.masters.empty(), stochastic);
    list.matrices.push_back(pack_matrix(
        op, a.self[i], a.grads[i], a.crow_indices[i], a.col_indices[i], a.exp_avgs[i], a.exp_avg_sqs[i],
        a.masters.empty() ? nullptr : &a.masters[i], a.state_steps[i], a.parameter_ids[i]));
  }
  return list;
}

}  // namespace partune
