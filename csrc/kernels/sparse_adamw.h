// Family sparse_adamw: AdamW on the selected entries of a list of matrices. What CPU and CUDA share:
// the shape of one matrix, and the arithmetic of one entry.
//
// Bytes moved per selected entry, float32: 4 index + 16 moments, and one 32-byte sector (a 64-byte
// line on the CPU) each for the gradient's read, the weight's read and its write, less what
// neighbours share: at 5 % a line of 16 floats is touched with probability 1 - 0.95^16 = 0.56.
#pragma once
#include "csr.h"
#include "philox.h"

namespace partune {

// The dtypes that a step is built for. Compute is float64 for float64 weights, else float32.
enum SparseAdamWTypes {
  kFloat64,
  kFloat32,
  kFloat32StateBFloat16,
  kBFloat16,
  kBFloat16StateBFloat16,
  kBFloat16GradFloat32,
  kBFloat16GradFloat32StateBFloat16,
  kHalf,
  kHalfStateBFloat16,
  kHalfGradFloat32,
  kHalfGradFloat32StateBFloat16,
  kSparseAdamWTypesCount,
};

// One parameter seen as [rows, columns]. Strides count elements. Without crow_indices the parameter
// is dense: entry j is storage position j of weight, grad and moments alike.
struct SparseAdamWMatrix {
  void* weight;
  const void* grad;  // [rows, columns], or [nnz] when grad_is_compact
  const int64_t* crow_indices;
  const int32_t* col_indices;
  void* exp_avg;
  void* exp_avg_sq;
  float* master;  // null: none
  const float* state_step;
  int64_t rows, columns, nnz;
  int64_t weight_row_stride, weight_column_stride;
  int64_t grad_row_stride, grad_column_stride;
  uint32_t parameter_id;
  bool grad_is_compact;
};

template <typename Real>
struct AdamWHyperparameters {
  Real beta1, one_minus_beta1, beta2, one_minus_beta2, weight_decay, eps;
  bool corrected;  // eps is added to the bias-corrected denominator
  bool maximize;
  bool stochastic;  // 16-bit weights without a master are rounded stochastically
};

// What a step on a device needs beyond its matrices. Numbers that live on the device are read there;
// without lr's pointer lr_value counts, without the others 1, no flag and 0.
template <typename Real>
struct SparseAdamWDeviceStep {
  AdamWHyperparameters<Real> hyperparameters;
  const float* lr;
  const float* grad_scale;
  const float* found_inf;
  const int64_t* seed;
  const int64_t* offset;
  Real lr_value;
};

// Two CSRs of the same shape.
struct CsrPair {
  const int64_t *old_crow_indices, *new_crow_indices;
  const int32_t *old_col_indices, *new_col_indices;
  int64_t rows, new_nnz;
};

// One vector of values in the order of each CSR.
struct RemapValues {
  const void* old_values;
  void* new_values;
  int bytes;  // of an element: 2, 4 or 8
};

// What is the same for all entries of a matrix in one step.
template <typename Real>
struct AdamWCoefficients {
  Real beta1, one_minus_beta1, beta2, one_minus_beta2;
  Real grad_factor;
  Real decay_factor;
  Real step_size;
  Real denominator_factor;
  Real eps;
};

// 1 - beta^step from 1 - beta: with a(n) = 1 - beta^n, a(m + n) = a(m) + a(n) - a(m)·a(n). There is
// nothing to cancel, and the same few operations give the same bits on every device.
template <typename Real>
PARTUNE_FN Real bias_correction(Real one_minus_beta, uint32_t step) {
  Real result = 0, power = one_minus_beta;
  for (; step != 0; step >>= 1) {
    if (step & 1u) result = multiply_add(power, Real(1) - result, result);
    power = multiply_add(power, Real(1) - power, power);
  }
  return result;
}

template <typename Real>
PARTUNE_FN AdamWCoefficients<Real> adamw_coefficients(const AdamWHyperparameters<Real>& h, Real lr,
                                                      Real grad_scale, uint32_t step) {
  const Real correction1 = bias_correction(h.one_minus_beta1, step);
  const Real correction2 = square_root(bias_correction(h.one_minus_beta2, step));
  AdamWCoefficients<Real> c;
  c.beta1 = h.beta1;
  c.one_minus_beta1 = h.one_minus_beta1;
  c.beta2 = h.beta2;
  c.one_minus_beta2 = h.one_minus_beta2;
  c.grad_factor = divide(h.maximize ? Real(-1) : Real(1), grad_scale);
  c.decay_factor = multiply_add(-lr, h.weight_decay, Real(1));
  c.step_size = divide(h.corrected ? lr : multiply(lr, correction2), correction1);
  c.denominator_factor = h.corrected ? divide(Real(1), correction2) : Real(1);
  c.eps = h.eps;
  return c;
}

template <typename Real>
PARTUNE_FN void adamw_update(Real grad, Real& weight, Real& exp_avg, Real& exp_avg_sq,
                             const AdamWCoefficients<Real>& c) {
  grad = multiply(grad, c.grad_factor);
  exp_avg = multiply_add(c.beta1, exp_avg, multiply(c.one_minus_beta1, grad));
  exp_avg_sq = multiply_add(c.beta2, exp_avg_sq, multiply(multiply(c.one_minus_beta2, grad), grad));
  const Real denominator = multiply_add(square_root(exp_avg_sq), c.denominator_factor, c.eps);
  weight = multiply_add(-c.step_size, divide(exp_avg, denominator), multiply(weight, c.decay_factor));
}

}  // namespace partune
