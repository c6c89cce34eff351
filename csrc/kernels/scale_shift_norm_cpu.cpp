// Norms with scale and shift. A row is read three times forward (mean, variance, output) and twice
// backward (sums, gradient); after the first time it lies in a cache. Backward, two rows at a time add to
// the columns' sums.
#include "lanes.h"
#include "scale_shift_cpu.h"
#include "stream.h"

#ifndef PARTUNE_ISA
#error "PARTUNE_ISA names the namespace, and so the instruction set, that this file is built for"
#endif

namespace partune {
namespace PARTUNE_ISA {
namespace {

constexpr int kTile = 512;

template <typename Real>
Real sum_of(const TwoLanes<Real>& lanes) {
  return sum_of_lanes(lanes.at[0] + lanes.at[1]);
}

template <typename Real>
PARTUNE_FN TwoLanes<Real> zeros() {
  return {{Lanes<Real>(Real(0)), Lanes<Real>(Real(0))}};
}

// The sum of term(x) over a row; `term` takes a number or lanes.
template <typename Stored, typename Real, typename Term>
inline __attribute__((always_inline)) Real sum_row(const Stored* input, int64_t columns, const Term& term) {
  constexpr int kChains = 2;  // sums that don't wait for each other
  TwoLanes<Real> sums[kChains] = {zeros<Real>(), zeros<Real>()};
  int64_t column = 0;
  for (; column + kChains * kTwice<Real> <= columns; column += kChains * kTwice<Real>) {
    PARTUNE_UNROLL
    for (int chain = 0; chain < kChains; ++chain) {
      const TwoLanes<Real> x = load_lanes(input + column + chain * kTwice<Real>);
      PARTUNE_UNROLL
      for (int i = 0; i < 2; ++i) sums[chain].at[i] = term(x.at[i], sums[chain].at[i]);
    }
  }
  Real rest = Real(0);
  for (; column < columns; ++column) rest = term(Real(widen(input[column])), rest);
  return sum_of(sums[0]) + sum_of(sums[1]) + rest;
}

// kTwice columns of a row.
template <typename Stored, typename Real>
PARTUNE_FN void forward_step(const Stored* input, Real mean, Real rstd, const Real* gain, const Real* offset,
                             Stored* output) {
  TwoLanes<Real> lanes = load_lanes(input);
  const TwoLanes<Real> gains = load_lanes(gain), offsets = load_lanes(offset);
  PARTUNE_UNROLL
  for (int i = 0; i < 2; ++i) {
    const Lanes<Real> x_hat = normalised(lanes.at[i], Lanes<Real>(mean), Lanes<Real>(rstd));
    lanes.at[i] = multiply_add(x_hat, gains.at[i], offsets.at[i]);
  }
  store_lanes(lanes, output);
}

template <typename Stored, typename Real>
void forward_columns(const Stored* input, Real mean, Real rstd, const Real* gain, const Real* offset,
                     int count, Stored* output) {
  int i = 0;
  for (; i + kTwice<Real> <= count; i += kTwice<Real>) {
    forward_step(input + i, mean, rstd, gain + i, offset + i, output + i);
  }
  if (i == count) return;
  Padded<Real, Stored> part(input + i, count - i);
  const Padded<Real, Real> gains(gain + i, count - i), offsets(offset + i, count - i);
  forward_step(part.at, mean, rstd, gains.at, offsets.at, part.at);
  part.copy_to(output + i, count - i);
}

template <typename Stored, typename Real>
void forward(const NormForward<Real>& task, int64_t begin, int64_t end) {
  const int64_t columns = task.channels;
  Stored buffer[kTile];
  for (int64_t row = begin; row < end; ++row) {
    const Stored* input = static_cast<const Stored*>(task.input) + row * columns;
    Stored* output = static_cast<Stored*>(task.output) + row * columns;
    Real mean = Real(0);
    if (task.mean) {
      const auto add = [](auto x, auto sum) __attribute__((always_inline)) { return sum + x; };
      mean = divide(sum_row<Stored, Real>(input, columns, add), Real(columns));
      task.mean[row] = mean;
    }
    const auto add_square = [mean](auto x, auto sum) __attribute__((always_inline)) {
      const auto centred = x - decltype(x)(mean);
      return multiply_add(centred, centred, sum);
    };
    const Real variance = divide(sum_row<Stored, Real>(input, columns, add_square), Real(columns));
    const Real rstd = divide(Real(1), square_root(variance + task.eps));
    task.rstd[row] = rstd;
    for (int64_t first = 0; first < columns; first += kTile) {
      const int count = int(smaller(columns - first, kTile));
      forward_columns(input + first, mean, rstd, task.gain + first, task.offset + first, count,
                      task.stream ? buffer : output + first);
      if (task.stream) stream(buffer, output + first, count * int64_t(sizeof(Stored)));
    }
  }
  if (task.stream) finish_stream();
}

// What the backward of a row takes, and its sums of g and g·x̂ over the columns.
template <typename Stored, typename Real>
struct RowGrads {
  const Stored *grad, *input;
  Stored* output;
  Real mean, rstd;
  TwoLanes<Real> grads, products;
  Real mean_grad, mean_product;

  PARTUNE_MEMBER RowGrads(const NormBackward<Real>& task, int64_t row)
      : grad(static_cast<const Stored*>(task.grad) + row * task.channels),
        input(static_cast<const Stored*>(task.input) + row * task.channels),
        output(static_cast<Stored*>(task.grad_input) + (task.grad_input ? row * task.channels : 0)),
        mean(task.mean ? task.mean[row] : Real(0)),
        rstd(task.rstd[row]),
        grads(zeros<Real>()),
        products(zeros<Real>()) {}

  PARTUNE_MEMBER void take_means(const NormBackward<Real>& task) {
    mean_grad = task.mean ? divide(sum_of(grads), Real(task.channels)) : Real(0);
    mean_product = divide(sum_of(products), Real(task.channels));
  }
};

// kTwice columns of kRows rows: their parts of the rows' sums and, where wanted, of the columns'.
template <bool kSums, int kRows, typename Stored, typename Real>
PARTUNE_FN void sum_step(const Stored* const (&grad)[kRows], const Stored* const (&input)[kRows],
                         RowGrads<Stored, Real> (&rows)[kRows], const Real* gain, Real* along, Real* plain) {
  const TwoLanes<Real> gains = load_lanes(gain);
  TwoLanes<Real> sum_along, sum_plain;
  if constexpr (kSums) {
    sum_along = load_lanes(along);
    sum_plain = load_lanes(plain);
  }
  PARTUNE_UNROLL
  for (int row = 0; row < kRows; ++row) {
    const TwoLanes<Real> g = load_lanes(grad[row]), x = load_lanes(input[row]);
    PARTUNE_UNROLL
    for (int i = 0; i < 2; ++i) {
      const Lanes<Real> x_hat = normalised(x.at[i], Lanes<Real>(rows[row].mean), Lanes<Real>(rows[row].rstd));
      const Lanes<Real> gained = multiply(g.at[i], gains.at[i]);
      rows[row].grads.at[i] = rows[row].grads.at[i] + gained;
      rows[row].products.at[i] = multiply_add(gained, x_hat, rows[row].products.at[i]);
      if constexpr (kSums) {
        sum_along.at[i] = multiply_add(g.at[i], x_hat, sum_along.at[i]);
        sum_plain.at[i] = sum_plain.at[i] + g.at[i];
      }
    }
  }
  if constexpr (kSums) {
    store_lanes(sum_along, along);
    store_lanes(sum_plain, plain);
  }
}

// kTwice columns of a row's gradient.
template <typename Stored, typename Real>
PARTUNE_FN void grad_step(const Stored* grad, const Stored* input, const RowGrads<Stored, Real>& row,
                          const Real* gain, Stored* output) {
  TwoLanes<Real> lanes = load_lanes(grad);
  const TwoLanes<Real> x = load_lanes(input), gains = load_lanes(gain);
  const Lanes<Real> mean_grad(row.mean_grad), mean_product(row.mean_product), rstd(row.rstd);
  PARTUNE_UNROLL
  for (int i = 0; i < 2; ++i) {
    const Lanes<Real> x_hat = normalised(x.at[i], Lanes<Real>(row.mean), rstd);
    lanes.at[i] = norm_grad(multiply(lanes.at[i], gains.at[i]), x_hat, mean_grad, mean_product, rstd);
  }
  store_lanes(lanes, output);
}

template <bool kSums, int kRows, typename Stored, typename Real>
void sum_rows(RowGrads<Stored, Real> (&rows)[kRows], const Real* gain, int64_t columns, Real* along,
              Real* plain) {
  const Stored *grad[kRows], *input[kRows];
  int64_t column = 0;
  for (; column + kTwice<Real> <= columns; column += kTwice<Real>) {
    for (int row = 0; row < kRows; ++row) {
      grad[row] = rows[row].grad + column;
      input[row] = rows[row].input + column;
    }
    sum_step<kSums>(grad, input, rows, gain + column, along + column, plain + column);
  }
  if (column == columns) return;
  const int left = int(columns - column);
  const Padded<Real, Real> gains(gain + column, left);
  Padded<Real, Real> sum_along(along + column, kSums ? left : 0), sum_plain(plain + column, kSums ? left : 0);
  for (int row = 0; row < kRows; ++row) {
    const Padded<Real, Stored> grads(rows[row].grad + column, left), inputs(rows[row].input + column, left);
    RowGrads<Stored, Real> one[1] = {rows[row]};
    sum_step<kSums>({grads.at}, {inputs.at}, one, gains.at, sum_along.at, sum_plain.at);
    rows[row] = one[0];
  }
  if constexpr (kSums) {
    sum_along.copy_to(along + column, left);
    sum_plain.copy_to(plain + column, left);
  }
}

template <typename Stored, typename Real>
void grad_row(const RowGrads<Stored, Real>& row, const Real* gain, int64_t columns, bool streams) {
  Stored buffer[kTile];
  for (int64_t first = 0; first < columns; first += kTile) {
    const int count = int(smaller(columns - first, kTile));
    const Stored *grad = row.grad + first, *input = row.input + first;
    Stored* output = streams ? buffer : row.output + first;
    int i = 0;
    for (; i + kTwice<Real> <= count; i += kTwice<Real>) {
      grad_step(grad + i, input + i, row, gain + first + i, output + i);
    }
    if (i < count) {
      Padded<Real, Stored> part(grad + i, count - i);
      const Padded<Real, Stored> inputs(input + i, count - i);
      const Padded<Real, Real> gains(gain + first + i, count - i);
      grad_step(part.at, inputs.at, row, gains.at, part.at);
      part.copy_to(output + i, count - i);
    }
    if (streams) stream(buffer, row.output + first, count * int64_t(sizeof(Stored)));
  }
}

template <bool kSums, int kRows, typename Stored, typename Real>
void backward_rows(const NormBackward<Real>& task, RowGrads<Stored, Real> (&rows)[kRows], Real* along,
                   Real* plain) {
  sum_rows<kSums>(rows, task.gain, task.channels, along, plain);
  if (!task.grad_input) return;
  for (RowGrads<Stored, Real>& row : rows) {
    row.take_means(task);
    grad_row(row, task.gain, task.channels, task.stream);
  }
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
  const int64_t stop = smaller((block + 1) * kSumRows, task.rows);
  int64_t row = block * kSumRows;
  for (; row + 2 <= stop; row += 2) {
    RowGrads<Stored, Real> rows[2] = {{task, row}, {task, row + 1}};
    backward_rows<kSums>(task, rows, along, plain);
  }
  if (row < stop) {
    RowGrads<Stored, Real> rows[1] = {{task, row}};
    backward_rows<kSums>(task, rows, along, plain);
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
