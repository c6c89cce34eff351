// Norms with scale and shift. A row is read three times forward (mean, variance, output) and twice
// backward (sums, gradient); after the first time it lies in a cache.
#include "scale_shift_cpu.h"
#include "stream.h"

#ifndef PARTUNE_ISA
#error "PARTUNE_ISA names the namespace, and so the instruction set, that this file is built for"
#endif

namespace partune {
namespace PARTUNE_ISA {
namespace {

constexpr int kTile = 512;
constexpr int kLanesOfSum = 64;  // partial sums of a row: columns equal modulo this share one

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename Real>
Real sum_of(Real (&lanes)[kLanesOfSum]) {
  for (int half = kLanesOfSum / 2; half >= 1; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// body(first column, count, whole) over parts of a row as long as a sum has lanes. Only the last part
// may be shorter; a count known to the compiler makes the others' loops straight code.
template <typename Body>
inline __attribute__((always_inline)) void for_lanes(int64_t columns, const Body& body) {
  int64_t column = 0;
  for (; column + kLanesOfSum <= columns; column += kLanesOfSum) body(column, kLanesOfSum);
  if (column < columns) body(column, int(columns - column));
}

template <typename Stored, typename Real>
Real sum_row(const Stored* input, int64_t columns) {
  Real lanes[kLanesOfSum] = {};
  for_lanes(columns, [&](int64_t column, int count) __attribute__((always_inline)) {
    for (int i = 0; i < count; ++i) lanes[i] += widen(input[column + i]);
  });
  return sum_of(lanes);
}

template <typename Stored, typename Real>
Real sum_squares(const Stored* input, int64_t columns, Real mean) {
  Real lanes[kLanesOfSum] = {};
  for_lanes(columns, [&](int64_t column, int count) __attribute__((always_inline)) {
    for (int i = 0; i < count; ++i) {
      const Real centred = widen(input[column + i]) - mean;
      lanes[i] = multiply_add(centred, centred, lanes[i]);
    }
  });
  return sum_of(lanes);
}

template <typename Stored, typename Real>
void forward(const NormForward<Real>& task, int64_t begin, int64_t end) {
  const int64_t columns = task.channels;
  Stored buffer[kTile];
  for (int64_t row = begin; row < end; ++row) {
    const Stored* input = static_cast<const Stored*>(task.input) + row * columns;
    Stored* output = static_cast<Stored*>(task.output) + row * columns;
    const Real mean = task.mean ? divide(sum_row<Stored, Real>(input, columns), Real(columns)) : Real(0);
    const Real variance = divide(sum_squares(input, columns, mean), Real(columns));
    const Real rstd = divide(Real(1), square_root(variance + task.eps));
    if (task.mean) task.mean[row] = mean;
    task.rstd[row] = rstd;
    for (int64_t first = 0; first < columns; first += kTile) {
      const int count = int(smaller(columns - first, kTile));
      Stored* target = task.stream ? buffer : output + first;
      const Stored* source = input + first;
      const Real *weight = task.weight + first, *bias = task.bias + first;
      const Real *scale = task.scale + first, *shift = task.shift + first;
#pragma GCC ivdep
      for (int i = 0; i < count; ++i) {
        const Real normed = multiply_add(normalised(widen(source[i]), mean, rstd), weight[i], bias[i]);
        round_nearest(multiply_add(normed, scale[i], shift[i]), target[i]);
      }
      if (task.stream) stream(buffer, output + first, count * int64_t(sizeof(Stored)));
    }
  }
  if (task.stream) finish_stream();
}

// The sums of one row: over the row of g and g·x̂, and its part of the columns' sums.
template <typename Real>
struct RowSums {
  Real grad, product;
};

template <bool kSums, typename Stored, typename Real>
RowSums<Real> sum_grads(const Stored* grad, const Stored* input, const Real* gain, int64_t columns, Real mean,
                        Real rstd, Real* along, Real* plain) {
  Real grads[kLanesOfSum] = {}, products[kLanesOfSum] = {};
  for_lanes(columns, [&](int64_t column, int count) __attribute__((always_inline)) {
#pragma GCC ivdep
    for (int i = 0; i < count; ++i) {
      const Real g = widen(grad[column + i]);
      const Real x_hat = normalised(widen(input[column + i]), mean, rstd);
      const Real gained = multiply(g, gain[column + i]);
      grads[i] += gained;
      products[i] = multiply_add(gained, x_hat, products[i]);
      if constexpr (kSums) {
        along[column + i] = multiply_add(g, x_hat, along[column + i]);
        plain[column + i] += g;
      }
    }
  });
  return {sum_of(grads), sum_of(products)};
}

template <bool kSums, typename Stored, typename Real>
void backward_block(const NormBackward<Real>& task, int64_t block) {
  const int64_t columns = task.channels;
  Real *along = nullptr, *plain = nullptr;
  if constexpr (kSums) {
    along = task.partial + block * 2 * columns;
    plain = along + columns;
    for (int64_t i = 0; i < 2 * columns; ++i) along[i] = Real(0);
  }
  Stored buffer[kTile];
  const int64_t stop = smaller((block + 1) * kSumRows, task.rows);
  for (int64_t row = block * kSumRows; row < stop; ++row) {
    const Stored* grad = static_cast<const Stored*>(task.grad) + row * columns;
    const Stored* input = static_cast<const Stored*>(task.input) + row * columns;
    const Real mean = task.mean ? task.mean[row] : Real(0), rstd = task.rstd[row];
    const RowSums<Real> sums = sum_grads<kSums>(grad, input, task.gain, columns, mean, rstd, along, plain);
    if (!task.grad_input) continue;
    const Real mean_grad = task.mean ? divide(sums.grad, Real(columns)) : Real(0);
    const Real mean_product = divide(sums.product, Real(columns));
    Stored* output = static_cast<Stored*>(task.grad_input) + row * columns;
    for (int64_t first = 0; first < columns; first += kTile) {
      const int count = int(smaller(columns - first, kTile));
      Stored* target = task.stream ? buffer : output + first;
      const Stored *grads = grad + first, *inputs = input + first;
      const Real* gain = task.gain + first;
#pragma GCC ivdep
      for (int i = 0; i < count; ++i) {
        const Real x_hat = normalised(widen(inputs[i]), mean, rstd);
        const Real gained = multiply(widen(grads[i]), gain[i]);
        round_nearest(norm_grad(gained, x_hat, mean_grad, mean_product, rstd), target[i]);
      }
      if (task.stream) stream(buffer, output + first, count * int64_t(sizeof(Stored)));
    }
  }
}

template <typename Stored, typename Real>
void backward(const NormBackward<Real>& task, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    if (task.partial) {
      backward_block<true, Stored>(task, block);
    } else {
      backward_block<false, Stored>(task, block);
    }
  }
  if (task.stream) finish_stream();
}

}  // namespace

const ScaleShiftNormCpu scale_shift_norm_cpu = {
    {forward<double, double>, backward<double, double>},
    {forward<float, float>, backward<float, float>},
    {forward<BFloat16, float>, backward<BFloat16, float>},
    {forward<Half, float>, backward<Half, float>},
};

}  // namespace PARTUNE_ISA
}  // namespace partune
