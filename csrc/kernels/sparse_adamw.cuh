// Family sparse_adamw on CUDA: one launch takes a list of matrices, which travels by value in its
// parameters. A block has a tile of consecutive entries of one matrix; a thread has four.
//
// Bytes moved, step: as sparse_adamw.h counts them, scattered accesses in 32-byte sectors; found_inf:
// index and gradient alone; remap: 4 per index of both CSRs, and each carried value in and out.
#pragma once
#include "entry_tiles.cuh"
#include "sparse_adamw.h"

namespace partune {

constexpr int kSparseAdamWMatrices = 240;  // what 32 KB of launch parameters hold
constexpr int kRemapValues = 16;

// The matrices of one launch; matrix i has blocks [first_block[i], first_block[i + 1]).
struct SparseAdamWBatch {
  int count;
  int first_block[kSparseAdamWMatrices + 1];
  SparseAdamWMatrix matrices[kSparseAdamWMatrices];
};

template <typename Real>
struct SparseAdamWLaunch {
  SparseAdamWDeviceStep<Real> step;
  SparseAdamWBatch batch;
};
static_assert(sizeof(SparseAdamWLaunch<double>) <= kLaunchParameterBytes, "a launch must fit its parameters");

// Where four consecutive entries are.
struct EntryPlaces {
  int64_t index[4];   // row·columns + column
  int64_t weight[4];  // offset in memory
  int64_t grad[4];
};

PARTUNE_FN EntryPlaces locate_entries(const SparseAdamWMatrix& m, const int64_t (&tile_rows)[2],
                                      int64_t position, int count) {
  Pack4<int32_t> columns = {};
  int64_t row = 0;
  if (m.crow_indices) {
    columns = load_pack(m.col_indices + position, count, is_aligned(m.col_indices));
    row = row_of(m.crow_indices, tile_rows[0], tile_rows[1], position);
  }
  EntryPlaces places;
  PARTUNE_UNROLL
  for (int i = 0; i < 4; ++i) {
    places.index[i] = places.weight[i] = places.grad[i] = position + i;
    if (m.crow_indices && i < count) {
      while (m.crow_indices[row + 1] <= position + i) ++row;
      places.index[i] = row * m.columns + columns.at[i];
      places.weight[i] = row * m.weight_row_stride + columns.at[i] * m.weight_column_stride;
      if (!m.grad_is_compact) {
        places.grad[i] = row * m.grad_row_stride + columns.at[i] * m.grad_column_stride;
      }
    }
  }
  return places;
}

// ---- the step ----

// What rounds the entries of one matrix in a step. Without a draw the key isn't used.
struct EntryRounding {
  bool stochastic;  // the weight; bfloat16 moments are rounded so in any case
  PhiloxKey key;
  uint32_t draw_step, parameter_id;
};

template <typename Weight, typename Real>
PARTUNE_FN EntryRounding entry_rounding(const SparseAdamWMatrix& m, const SparseAdamWDeviceStep<Real>& step) {
  const uint64_t seed = step.seed ? uint64_t(*step.seed) : 0;
  EntryRounding rounding = {};
  if constexpr (sizeof(Weight) < sizeof(Real)) {
    rounding.stochastic = !m.master && step.hyperparameters.stochastic;
  }
  rounding.key = {uint32_t(seed), uint32_t(seed >> 32)};
  rounding.draw_step = uint32_t(*m.state_step) + uint32_t(step.offset ? *step.offset : 0);
  rounding.parameter_id = m.parameter_id;
  return rounding;
}

// Steps the entry at `index`: `value` becomes the unrounded weight; returns the rounded one.
template <typename Weight, typename State, typename Real>
PARTUNE_FN Weight step_entry(Real grad, Real& value, State& average, State& square, uint64_t index,
                             const AdamWCoefficients<Real>& coefficients, const EntryRounding& rounding) {
  constexpr bool kRoundedState = sizeof(State) < sizeof(Real);
  Real first = widen(average), second = widen(square);
  adamw_update(grad, value, first, second, coefficients);
  PhiloxBlock random = {};
  if (rounding.stochastic || kRoundedState) {
    random = philox(index, rounding.draw_step, rounding.parameter_id, rounding.key);
  }
  if (kRoundedState) {
    round_stochastic(first, random.word[1], average);
    round_stochastic(second, random.word[2], square);
  } else {
    round_nearest(first, average);
    round_nearest(second, square);
  }
  Weight rounded;
  if (rounding.stochastic) {
    round_stochastic(value, random.word[0], rounded);
  } else {
    round_nearest(value, rounded);
  }
  return rounded;
}

template <typename Weight, typename Grad, typename State, typename Real>
PARTUNE_FN void step_entries(const SparseAdamWMatrix& m, const SparseAdamWDeviceStep<Real>& step,
                             const AdamWCoefficients<Real>& coefficients, const EntryPlaces& places,
                             int64_t position, int count) {
  Weight* weight = static_cast<Weight*>(m.weight);
  const Grad* grad = static_cast<const Grad*>(m.grad);
  State* exp_avg = static_cast<State*>(m.exp_avg) + position;
  State* exp_avg_sq = static_cast<State*>(m.exp_avg_sq) + position;
  bool has_master = false;
  if constexpr (sizeof(Weight) < sizeof(Real)) has_master = m.master != nullptr;
  const bool aligned = is_aligned(exp_avg) && is_aligned(exp_avg_sq) && is_aligned(m.master);

  // All loads first: a thread has eight scattered reads under way.
  Pack4<State> average = load_pack(exp_avg, count, aligned);
  Pack4<State> square = load_pack(exp_avg_sq, count, aligned);
  Pack4<float> master = {};
  if (has_master) master = load_pack(m.master + position, count, aligned);
  Real grads[4], values[4];
  PARTUNE_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (i < count) {
      grads[i] = widen(grad[places.grad[i]]);
      values[i] = has_master ? Real(master.at[i]) : widen(weight[places.weight[i]]);
    }
  }

  const EntryRounding rounding = entry_rounding<Weight>(m, step);
  PARTUNE_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (i < count) {
      Real value = values[i];
      weight[places.weight[i]] = step_entry<Weight>(grads[i], value, average.at[i], square.at[i],
                                                    uint64_t(places.index[i]), coefficients, rounding);
      master.at[i] = float(value);
    }
  }
  store_pack(average, exp_avg, count, aligned);
  store_pack(square, exp_avg_sq, count, aligned);
  if (has_master) store_pack(master, m.master + position, count, aligned);
}

template <typename Real>
PARTUNE_FN AdamWCoefficients<Real> step_coefficients(const SparseAdamWMatrix& m,
                                                     const SparseAdamWDeviceStep<Real>& step) {
  const Real lr = step.lr ? Real(*step.lr) : step.lr_value;
  const Real grad_scale = step.grad_scale ? Real(*step.grad_scale) : Real(1);
  return adamw_coefficients(step.hyperparameters, lr, grad_scale, uint32_t(*m.state_step));
}

// SASS <float, float, float>: LDG.E.128 x3, STG.E.128 x2
// SASS <BFloat16, BFloat16, float>: LDG.E.128 x4, STG.E.128 x3
// SASS <BFloat16, BFloat16, BFloat16>: LDG.E.128 x2, LDG.E.64 x2, STG.E.128, STG.E.64 x2
template <typename Weight, typename Grad, typename State, typename Real, int kBlock>
__global__ void __launch_bounds__(kBlock, sizeof(Real) == 4 ? 3 : 2)
    sparse_adamw_kernel(LAUNCH_PARAMETER(SparseAdamWLaunch<Real>) launch) {
  SHARED(AdamWCoefficients<Real>, coefficients, [1]);
  SHARED(int64_t, tile_rows, [2]);
  const int number = matrix_of_block(launch.batch, int(blockIdx.x));
  const SparseAdamWMatrix& m = launch.batch.matrices[number];
  const EntryTile<kBlock> tile(int(blockIdx.x) - launch.batch.first_block[number], m.nnz);
  find_tile_rows(m.crow_indices, m.rows, tile, tile_rows);
  if (threadIdx.x == 32) coefficients[0] = step_coefficients(m, launch.step);
  __syncthreads();
  const bool wanted = !launch.step.found_inf || *launch.step.found_inf == 0;
  if (wanted) {
    const EntryPlaces places = locate_entries(m, tile_rows, tile.position, tile.count);
    step_entries<Weight, Grad, State>(m, launch.step, coefficients[0], places, tile.position, tile.count);
  }
}

// ---- the flag ----

// Sets *found_inf to 1 if a gradient has all bits of its exponent set. Word is a gradient's bits.
// SASS: LDG.E.128
template <typename Word, int kBlock>
__global__ void __launch_bounds__(kBlock)
    found_inf_kernel(LAUNCH_PARAMETER(SparseAdamWBatch) batch, const Word exponent, float* found_inf) {
  SHARED(int64_t, tile_rows, [2]);
  const int number = matrix_of_block(batch, int(blockIdx.x));
  const SparseAdamWMatrix& m = batch.matrices[number];
  const EntryTile<kBlock> tile(int(blockIdx.x) - batch.first_block[number], m.nnz);
  find_tile_rows(m.crow_indices, m.rows, tile, tile_rows);
  __syncthreads();
  bool found = false;
  const Word* grad = static_cast<const Word*>(m.grad);
  const EntryPlaces places = locate_entries(m, tile_rows, tile.position, tile.count);
  PARTUNE_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (i < tile.count) found |= (grad[places.grad[i]] & exponent) == exponent;
  }
  if (__syncthreads_or(found) && threadIdx.x == 0) atomicExch(found_inf, 1.0f);
}

// ---- from one CSR to another ----

struct RemapLaunch {
  CsrPair csrs;
  unsigned long long* kept;  // null: counted by another launch
  int count;
  RemapValues values[kRemapValues];
};

template <typename Word>
PARTUNE_FN void carry_value(const RemapValues& values, int64_t from, int64_t to) {
  static_cast<Word*>(values.new_values)[to] = static_cast<const Word*>(values.old_values)[from];
}

// A thread looks up its new entries' columns in the old row. kept counts those that it finds.
// SASS: none (a binary search reads one index at a time)
template <int kBlock>
__global__ void __launch_bounds__(kBlock) remap_kernel(LAUNCH_PARAMETER(RemapLaunch) launch) {
  SHARED(int64_t, tile_rows, [2]);
  const CsrPair& csrs = launch.csrs;
  const EntryTile<kBlock> tile(int(blockIdx.x), csrs.new_nnz);
  find_tile_rows(csrs.new_crow_indices, csrs.rows, tile, tile_rows);
  __syncthreads();
  uint32_t kept = 0;
  for (int64_t position = tile.begin + threadIdx.x; position < tile.end; position += kBlock) {
    const int64_t row = row_of(csrs.new_crow_indices, tile_rows[0], tile_rows[1], position);
    const int32_t column = csrs.new_col_indices[position];
    const int64_t row_end = csrs.old_crow_indices[row + 1];
    int64_t first = csrs.old_crow_indices[row];
    for (int64_t length = row_end - first; length > 0;) {
      const int64_t half = length / 2;
      if (csrs.old_col_indices[first + half] < column) {
        first += half + 1;
        length -= half + 1;
      } else {
        length = half;
      }
    }
    if (first < row_end && csrs.old_col_indices[first] == column) {
      ++kept;
      for (int i = 0; i < launch.count; ++i) {
        const RemapValues& values = launch.values[i];
        if (values.bytes == 8) {
          carry_value<uint64_t>(values, first, position);
        } else if (values.bytes == 4) {
          carry_value<uint32_t>(values, first, position);
        } else {
          carry_value<uint16_t>(values, first, position);
        }
      }
    }
  }
  PARTUNE_UNROLL
  for (int step = 1; step < 32; step *= 2) kept += __shfl_xor_sync(0xffffffffu, kept, step);
  if (launch.kept && threadIdx.x % 32 == 0) {
    atomicAdd(launch.kept, static_cast<unsigned long long>(kept));
  }
}

}  // namespace partune
