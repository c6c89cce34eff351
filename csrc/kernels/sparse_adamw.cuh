// Family sparse_adamw on CUDA: one launch steps a list of matrices, which travels by value in the
// launch's parameters. A block takes a tile of consecutive entries of one matrix; a thread takes four.
//
// Bytes moved: as sparse_adamw.h counts them, scattered accesses in 32-byte sectors.
#pragma once
#include "kit.cuh"
#include "sparse_adamw.h"

namespace partune {

constexpr int kSparseAdamWBlock = 256;
constexpr int kSparseAdamWTile = kSparseAdamWBlock * 4;
constexpr int kSparseAdamWMatrices = 240;  // what 32 KB of launch parameters hold

struct SparseAdamWLaunch {
  SparseAdamWDeviceStep step;
  int count;
  int first_block[kSparseAdamWMatrices + 1];
  SparseAdamWMatrix matrices[kSparseAdamWMatrices];
};
static_assert(sizeof(SparseAdamWLaunch) <= 32764, "launch parameters must fit 32,764 bytes");

PARTUNE_FN int matrix_of_block(const SparseAdamWLaunch& launch, int block) {
  int first = 0, last = launch.count - 1;
  while (first < last) {
    const int middle = first + (last - first + 1) / 2;
    if (launch.first_block[middle] <= block) {
      first = middle;
    } else {
      last = middle - 1;
    }
  }
  return first;
}

// Four consecutive entries in registers.
struct Entries {
  int64_t index[4];   // row·columns + column
  int64_t weight[4];  // where the weight is in memory
  float grad[4], value[4];
};

// Loads of one entry don't wait for those of another: a thread has eight scattered reads under way.
template <typename Weight, typename Grad>
PARTUNE_FN void gather_entries(const SparseAdamWMatrix& m, int64_t first_row, int64_t last_row,
                               int64_t position, int count, bool has_master, Entries& entries) {
  const Weight* weight = static_cast<const Weight*>(m.weight);
  const Grad* grad = static_cast<const Grad*>(m.grad);
  Pack4<int32_t> columns = {};
  int64_t row = first_row;
  if (m.crow_indices) {
    columns = load_pack(m.col_indices + position, count, is_aligned(m.col_indices));
    row = row_of(m.crow_indices, first_row, last_row, position);
  }
  PARTUNE_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (i < count) {
      int64_t grad_offset = position + i;
      entries.index[i] = entries.weight[i] = position + i;
      if (m.crow_indices) {
        while (m.crow_indices[row + 1] <= position + i) ++row;
        entries.index[i] = row * m.columns + columns.at[i];
        entries.weight[i] = row * m.weight_row_stride + columns.at[i] * m.weight_column_stride;
        if (!m.grad_is_compact) grad_offset = row * m.grad_row_stride + columns.at[i] * m.grad_column_stride;
      }
      entries.grad[i] = widen(grad[grad_offset]);
      if (!has_master) entries.value[i] = widen(weight[entries.weight[i]]);
    }
  }
}

template <typename Weight, typename Grad, typename State>
PARTUNE_FN void step_entries(const SparseAdamWMatrix& m, const SparseAdamWDeviceStep& step,
                             const AdamWCoefficients<float>& coefficients, int64_t first_row,
                             int64_t last_row, int64_t position, int count) {
  constexpr bool kRoundedWeight = sizeof(Weight) < sizeof(float);
  constexpr bool kRoundedState = sizeof(State) < sizeof(float);
  Weight* weight = static_cast<Weight*>(m.weight);
  State* exp_avg = static_cast<State*>(m.exp_avg) + position;
  State* exp_avg_sq = static_cast<State*>(m.exp_avg_sq) + position;
  const bool has_master = kRoundedWeight && m.master != nullptr;
  const bool aligned = is_aligned(exp_avg) && is_aligned(exp_avg_sq) && (!has_master || is_aligned(m.master));
  const bool stochastic = kRoundedWeight && !has_master && step.hyperparameters.stochastic;

  Entries entries;
  gather_entries<Weight, Grad>(m, first_row, last_row, position, count, has_master, entries);
  Pack4<State> average = load_pack(exp_avg, count, aligned);
  Pack4<State> square = load_pack(exp_avg_sq, count, aligned);
  Pack4<float> master = {};
  if (has_master) master = load_pack(m.master + position, count, aligned);

  const uint64_t seed = step.seed ? uint64_t(*step.seed) : 0;
  const PhiloxKey key{uint32_t(seed), uint32_t(seed >> 32)};
  const uint32_t draw_step = uint32_t(*m.state_step) + uint32_t(step.offset ? *step.offset : 0);
  PARTUNE_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (i < count) {
      float first = widen(average.at[i]), second = widen(square.at[i]);
      float value = has_master ? master.at[i] : entries.value[i];
      adamw_update(entries.grad[i], value, first, second, coefficients);
      PhiloxBlock random = {};
      if (stochastic || kRoundedState) {
        random = philox(uint64_t(entries.index[i]), draw_step, m.parameter_id, key);
      }
      if (kRoundedState) {
        round_stochastic(first, random.word[1], average.at[i]);
        round_stochastic(second, random.word[2], square.at[i]);
      } else {
        round_nearest(first, average.at[i]);
        round_nearest(second, square.at[i]);
      }
      Weight rounded;
      if (stochastic) {
        round_stochastic(value, random.word[0], rounded);
      } else {
        round_nearest(value, rounded);
      }
      weight[entries.weight[i]] = rounded;
      master.at[i] = value;
    }
  }
  store_pack(average, exp_avg, count, aligned);
  store_pack(square, exp_avg_sq, count, aligned);
  if (has_master) store_pack(master, m.master + position, count, aligned);
}

template <typename Weight, typename Grad, typename State, int kBlock>
__global__ void __launch_bounds__(kBlock, 3)
    sparse_adamw_kernel(const GRID_CONSTANT SparseAdamWLaunch launch) {
  SHARED(AdamWCoefficients<float>, coefficients, [1]);
  SHARED(int64_t, tile_rows, [2]);
  const int number = matrix_of_block(launch, int(blockIdx.x));
  const SparseAdamWMatrix& m = launch.matrices[number];
  const int64_t begin = int64_t(int(blockIdx.x) - launch.first_block[number]) * (4 * kBlock);
  const int64_t end = begin + 4 * kBlock < m.nnz ? begin + 4 * kBlock : m.nnz;
  if (threadIdx.x < 2 && m.crow_indices) {
    tile_rows[threadIdx.x] = row_of(m.crow_indices, 0, m.rows - 1, threadIdx.x == 0 ? begin : end - 1);
  }
  if (threadIdx.x == 32) {
    const float lr = launch.step.lr ? *launch.step.lr : launch.step.lr_value;
    const float grad_scale = launch.step.grad_scale ? *launch.step.grad_scale : 1.0f;
    coefficients[0] =
        adamw_coefficients(launch.step.hyperparameters, lr, grad_scale, uint32_t(*m.state_step));
  }
  __syncthreads();
  const int64_t position = begin + 4 * int64_t(threadIdx.x);
  const int count = int(end - position < 4 ? end - position : 4);
  const bool wanted = !launch.step.found_inf || *launch.step.found_inf == 0;
  if (wanted && count > 0) {
    step_entries<Weight, Grad, State>(m, launch.step, coefficients[0], tile_rows[0], tile_rows[1], position,
                                      count);
  }
}

}  // namespace partune
