// Checks of family select, shared by the CPU and the CUDA binding.
#pragma once
#include <cmath>
#include <limits>
#include <tuple>

#include "checks.h"

namespace partune {

using Csr = std::tuple<Tensor, Tensor>;

inline void check_matrix(const char* op, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.is_contiguous(), op, ": ", name,
                  " must be a contiguous matrix");
  STD_TORCH_CHECK(tensor.size(1) <= INT32_MAX, op, ": ", name, " has more columns than int32 can count");
}

inline void check_k(const char* op, int64_t k, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(k >= 0 && k <= rows * columns, op, ": k must lie in [0, ", rows * columns, "], got ", k);
}

inline void check_factors(const char* op, const Tensor& left, const Tensor& right, int64_t k) {
  check_matrix(op, "left", left);
  check_matrix(op, "right", right);
  check_dtype(op, "left", left, {ScalarType::Float, ScalarType::Double});
  check_dtype(op, "right", right, {left.scalar_type()});
  STD_TORCH_CHECK(left.device() == right.device(), op, ": left and right must be on one device");
  STD_TORCH_CHECK(left.size(1) == right.size(0), op, ": left has ", left.size(1), " columns, right ",
                  right.size(0), " rows");
  check_k(op, k, left.size(0), right.size(1));
}

inline void check_threshold(const char* op, double threshold) {
  STD_TORCH_CHECK(threshold == threshold, op, ": threshold must be a number, got NaN");
}

inline void check_random(const char* op, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(rows >= 0 && columns >= 0, op, ": rows and columns must not be negative");
}

// The last score that doesn't pass: comparing with it is comparing with the float64 threshold.
template <typename Score>
Score last_excluded(double threshold, bool largest) {
  Score last = Score(threshold);
  const Score infinity = std::numeric_limits<Score>::infinity();
  if (largest && double(last) > threshold) last = std::nextafter(last, -infinity);
  if (!largest && double(last) < threshold) last = std::nextafter(last, infinity);
  return last;
}

}  // namespace partune
