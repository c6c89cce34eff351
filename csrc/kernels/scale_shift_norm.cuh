// Norms with scale and shift on CUDA: a block has a row at a time. Forward it reads the row three times
// (mean, variance, output), backward twice (sums, gradient); after the first time a cache has it. Backward
// a block goes through several rows and adds their columns' sums up, in shared memory where that is
// large enough, else where the partial sums go.
//
// Bytes moved: as scale_shift.h counts them; partial sums of two numbers per channel and block.
#pragma once
#include "scale_shift.cuh"

namespace partune {

constexpr int kNormBlock = 256;

// The sum over a block, the same in every thread. All threads call it.
template <int kBlock, typename Real>
PARTUNE_FN Real sum_block(Real value, Real (&warps)[kBlock / 32]) {
  PARTUNE_UNROLL
  for (int step = 16; step >= 1; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  __syncthreads();  // the sums of the call before have been read
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  Real sum = warps[0];
  PARTUNE_UNROLL
  for (int warp = 1; warp < kBlock / 32; ++warp) sum += warps[warp];
  return sum;
}

// The sum over a row of term(x). All threads of the block call it.
template <int kBlock, typename Stored, typename Real, typename Term>
PARTUNE_FN Real sum_row(const Stored* row, int64_t columns, Real (&warps)[kBlock / 32], const Term& term) {
  constexpr int kPack = kPackSize<Stored>;
  const bool aligned = is_wide_aligned(row);
  Real sum = 0;
  for (int64_t column = int64_t(threadIdx.x) * kPack; column < columns; column += int64_t{kBlock} * kPack) {
    const WidePack<Stored> pack = load_wide(row + column, columns - column, aligned);
    PARTUNE_UNROLL
    for (int i = 0; i < kPack; ++i) {
      if (column + i < columns) sum = term(widen(pack.at[i]), sum);
    }
  }
  return sum_block<kBlock>(sum, warps);
}

struct Sum {
  template <typename Real>
  PARTUNE_MEMBER Real operator()(Real x, Real sum) const {
    return sum + x;
  }
};

template <typename Real>
struct SumOfSquares {
  Real mean;
  PARTUNE_MEMBER Real operator()(Real x, Real sum) const { return multiply_add(x - mean, x - mean, sum); }
};

// SASS <float>: LDG.E.128 x3, STG.E.128
// SASS <BFloat16>: LDG.E.128 x3, STG.E.128
template <typename Stored, typename Real, int kBlock>
__global__ void __launch_bounds__(kBlock) norm_scale_shift_kernel(const NormTask task, const Real eps) {
  constexpr int kPack = kPackSize<Stored>;
  SHARED(Real, warps, [kBlock / 32]);
  const int64_t row = int64_t(blockIdx.x), columns = task.channels;
  const Stored* input = static_cast<const Stored*>(task.input) + row * columns;
  Stored* output = static_cast<Stored*>(task.output) + row * columns;
  Real mean = 0;
  if (task.mean) {
    mean = divide(sum_row<kBlock>(input, columns, warps, Sum()), Real(columns));
  }
  const Real squares = sum_row<kBlock>(input, columns, warps, SumOfSquares<Real>{mean});
  const Real rstd = divide(Real(1), square_root(divide(squares, Real(columns)) + eps));
  if (threadIdx.x == 0) {
    if (task.mean) static_cast<Real*>(task.mean)[row] = mean;
    static_cast<Real*>(task.rstd)[row] = rstd;
  }
  for (int64_t column = int64_t(threadIdx.x) * kPack; column < columns; column += int64_t{kBlock} * kPack) {
    WidePack<Stored> pack = load_wide(input + column, columns - column, is_wide_aligned(input));
    PARTUNE_UNROLL
    for (int i = 0; i < kPack; ++i) {
      if (column + i < columns) {
        const Real weight = read_channel<Stored>(task.weight, column + i, Real(1));
        const Real bias = read_channel<Stored>(task.bias, column + i, Real(0));
        const Real scale = read_channel<Stored>(task.scale, column + i, Real(1));
        const Real shift = read_channel<Stored>(task.shift, column + i, Real(0));
        const Real normed = multiply_add(normalised(widen(pack.at[i]), mean, rstd), weight, bias);
        round_nearest(multiply_add(normed, scale, shift), pack.at[i]);
      }
    }
    store_wide(pack, output + column, columns - column, is_wide_aligned(output));
  }
}

// A thread's part of a row: its sums of g and g·x̂, and its columns' sums.
template <int kBlock, typename Stored, typename Real>
PARTUNE_FN void sum_row_grads(const NormTask& task, int64_t row, Real mean, Real rstd, Real* along,
                              Real* plain, Real& grads, Real& products) {
  constexpr int kPack = kPackSize<Stored>;
  const int64_t columns = task.channels;
  const Stored* input = static_cast<const Stored*>(task.input) + row * columns;
  const Stored* grad = static_cast<const Stored*>(task.grad) + row * columns;
  for (int64_t column = int64_t(threadIdx.x) * kPack; column < columns; column += int64_t{kBlock} * kPack) {
    const WidePack<Stored> x = load_wide(input + column, columns - column, is_wide_aligned(input));
    const WidePack<Stored> g = load_wide(grad + column, columns - column, is_wide_aligned(grad));
    PARTUNE_UNROLL
    for (int i = 0; i < kPack; ++i) {
      if (column + i < columns) {
        const Real x_hat = normalised(widen(x.at[i]), mean, rstd);
        const Real gain = multiply(read_channel<Stored>(task.scale, column + i, Real(1)),
                                   read_channel<Stored>(task.weight, column + i, Real(1)));
        const Real gained = multiply(widen(g.at[i]), gain);
        grads += gained;
        products = multiply_add(gained, x_hat, products);
        if (along) {
          along[column + i] = multiply_add(widen(g.at[i]), x_hat, along[column + i]);
          plain[column + i] += widen(g.at[i]);
        }
      }
    }
  }
}

template <int kBlock, typename Stored, typename Real>
PARTUNE_FN void write_row_grads(const NormTask& task, int64_t row, Real mean, Real rstd, Real mean_grad,
                                Real mean_product) {
  constexpr int kPack = kPackSize<Stored>;
  const int64_t columns = task.channels;
  const Stored* input = static_cast<const Stored*>(task.input) + row * columns;
  const Stored* grad = static_cast<const Stored*>(task.grad) + row * columns;
  Stored* output = static_cast<Stored*>(task.output) + row * columns;
  for (int64_t column = int64_t(threadIdx.x) * kPack; column < columns; column += int64_t{kBlock} * kPack) {
    const WidePack<Stored> x = load_wide(input + column, columns - column, is_wide_aligned(input));
    WidePack<Stored> g = load_wide(grad + column, columns - column, is_wide_aligned(grad));
    PARTUNE_UNROLL
    for (int i = 0; i < kPack; ++i) {
      if (column + i < columns) {
        const Real x_hat = normalised(widen(x.at[i]), mean, rstd);
        const Real gain = multiply(read_channel<Stored>(task.scale, column + i, Real(1)),
                                   read_channel<Stored>(task.weight, column + i, Real(1)));
        const Real gained = multiply(widen(g.at[i]), gain);
        round_nearest(norm_grad(gained, x_hat, mean_grad, mean_product, rstd), g.at[i]);
      }
    }
    store_wide(g, output + column, columns - column, is_wide_aligned(output));
  }
}

// SASS <float>: LDG.E.128 x4, STG.E.128
// SASS <BFloat16>: LDG.E.128 x4, STG.E.128
template <typename Stored, typename Real, int kBlock>
__global__ void __launch_bounds__(kBlock) norm_scale_shift_backward_kernel(const NormTask task) {
  constexpr int kPack = kPackSize<Stored>;
  SHARED(Real, warps, [kBlock / 32]);
  DYN_SHARED(Real, shared_sums);
  const int64_t columns = task.channels;
  Real* partial = static_cast<Real*>(task.partial);
  if (partial) partial += int64_t(blockIdx.x) * 2 * columns;
  // A thread has the same columns in every row, so nobody else's sums, and no barrier guards them.
  Real* along = task.shared_sums ? shared_sums : partial;
  Real* plain = along ? along + columns : nullptr;
  if (along) {
    for (int64_t column = int64_t(threadIdx.x) * kPack; column < columns; column += int64_t{kBlock} * kPack) {
      for (int64_t i = column; i < column + kPack && i < columns; ++i) along[i] = plain[i] = Real(0);
    }
  }
  const int64_t first = int64_t(blockIdx.x) * task.block_rows;
  const int64_t end = first + task.block_rows < task.rows ? first + task.block_rows : task.rows;
  for (int64_t row = first; row < end; ++row) {
    const Real mean = task.mean ? static_cast<const Real*>(task.mean)[row] : Real(0);
    const Real rstd = static_cast<const Real*>(task.rstd)[row];
    Real grads = 0, products = 0;
    sum_row_grads<kBlock, Stored>(task, row, mean, rstd, along, plain, grads, products);
    if (task.output) {
      const Real mean_grad = divide(sum_block<kBlock>(grads, warps), Real(columns));
      const Real mean_product = divide(sum_block<kBlock>(products, warps), Real(columns));
      write_row_grads<kBlock, Stored>(task, row, mean, rstd, task.mean ? mean_grad : Real(0), mean_product);
    }
  }
  if (along != partial) {
    for (int64_t column = int64_t(threadIdx.x) * kPack; column < columns; column += int64_t{kBlock} * kPack) {
      for (int64_t i = column; i < column + kPack && i < columns; ++i) {
        partial[i] = along[i];
        partial[columns + i] = plain[i];
      }
    }
  }
}

}  // namespace partune
