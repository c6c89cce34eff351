// Family half_mask on CUDA: one launch takes a list of matrices, which travels by value in its
// parameters. A block has a tile of one matrix, a thread four consecutive entries: of the state for rows
// and columns, of the matrix for elements, so that a warp has the entries of one mask counter.
//
// Bytes moved, step: as half_mask.h counts them; a half-full sector of the weight is written whole, with
// the frozen entries' own bits. random_mask: 1/8 per entry, written; mask_counts: 1/8 per entry, read.
#pragma once
#include "half_mask.h"
#include "sparse_adamw.cuh"

namespace partune {

constexpr int kHalfBlock = 256;
static_assert(kHalfBlock * 4 == kHalfTile, "a block has a tile");
constexpr int kHalfMatrices = 170;  // what 32 KB of launch parameters hold

struct HalfBatch {
  int count;
  int first_block[kHalfMatrices + 1];
  HalfMatrix matrices[kHalfMatrices];
};

template <typename Real>
struct HalfLaunch {
  SparseAdamWDeviceStep<Real> step;
  const int64_t* mask_seed;  // null: all masks are stored
  HalfBatch batch;
};
static_assert(sizeof(HalfLaunch<double>) <= kLaunchParameterBytes, "a launch must fit its parameters");

// ---- rows and columns ----

PARTUNE_FN EntryPlaces locate_live(const HalfMatrix& m, int64_t position, int count) {
  const SparseAdamWMatrix& at = m.entries;
  const bool by_row = m.level == kHalfRows;
  const int64_t width = by_row ? at.columns : m.live_count;
  int64_t slot = position / width, within = position - slot * width;
  EntryPlaces places;
  PARTUNE_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (i < count) {
      const int64_t row = by_row ? m.live[slot] : slot;
      const int64_t column = by_row ? within : m.live[within];
      places.index[i] = row * at.columns + column;
      places.weight[i] = row * at.weight_row_stride + column * at.weight_column_stride;
      places.grad[i] = row * at.grad_row_stride + column * at.grad_column_stride;
      if (++within == width) {
        within = 0;
        ++slot;
      }
    }
  }
  return places;
}

// SASS <float, float, float>: LDG.E.128 x2, STG.E.128 x2
// SASS <BFloat16, BFloat16, float>: LDG.E.128 x3, STG.E.128 x3
template <typename Weight, typename Grad, typename State, typename Real, int kBlock>
__global__ void __launch_bounds__(kBlock, sizeof(Real) == 4 ? 3 : 2)
    half_lines_kernel(LAUNCH_PARAMETER(HalfLaunch<Real>) launch) {
  SHARED(AdamWCoefficients<Real>, coefficients, [1]);
  const int number = matrix_of_block(launch.batch, int(blockIdx.x));
  const HalfMatrix& m = launch.batch.matrices[number];
  const EntryTile<kBlock> tile(int(blockIdx.x) - launch.batch.first_block[number], m.entries.nnz);
  if (threadIdx.x == 0) coefficients[0] = step_coefficients(m.entries, launch.step);
  __syncthreads();
  const bool wanted = !launch.step.found_inf || *launch.step.found_inf == 0;
  if (wanted) {
    const EntryPlaces places = locate_live(m, tile.position, tile.count);
    step_entries<Weight, Grad, State>(m.entries, launch.step, coefficients[0], places, tile.position,
                                      tile.count);
  }
}

// ---- elements ----

// The mask of the 128 entries from `first` on, those from `count` on as frozen.
PARTUNE_FN PhiloxBlock draw_mask(int64_t first, int64_t count, uint32_t mask_id, PhiloxKey key) {
  PhiloxBlock mask = philox(uint64_t(first / kCounterEntries), kMaskDraw, mask_id, key);
  PARTUNE_UNROLL
  for (int i = 0; i < 4; ++i) mask.word[i] = first_bits(mask.word[i], count - first - 32 * int64_t(i));
  return mask;
}

PARTUNE_FN PhiloxBlock read_mask(const uint32_t* words, int64_t first, int64_t count) {
  PhiloxBlock mask = {};
  if (first < count) {
    const Pack4<uint32_t> pack = load_pack(words + first / 32, 4, is_aligned(words));
    PARTUNE_UNROLL
    for (int i = 0; i < 4; ++i) mask.word[i] = first_bits(pack.at[i], count - first - 32 * int64_t(i));
  }
  return mask;
}

PARTUNE_FN PhiloxKey mask_key_of(const int64_t* seed) {
  const uint64_t bits = seed ? uint64_t(*seed) : 0;
  return {uint32_t(bits), uint32_t(bits >> 32)};
}

// The live ones of a thread's four entries: a bit each, and how many come before them in their warp.
struct LiveFour {
  uint32_t bits;
  int before, warp_total;
};

PARTUNE_FN LiveFour live_four(const PhiloxBlock& mask, int lane) {
  const int word = lane / 8, shift = lane % 8 * 4;
  LiveFour four = {0, 0, 0};
  PARTUNE_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int all = count_bits(mask.word[i]);
    four.warp_total += all;
    if (i < word) four.before += all;
    if (i == word) {
      four.before += count_bits(mask.word[i] & ((1u << shift) - 1u));
      four.bits = mask.word[i] >> shift & 0xfu;
    }
  }
  return four;
}

template <typename Weight, typename Grad, typename State, typename Real>
PARTUNE_FN void step_live_four(const SparseAdamWMatrix& m, const SparseAdamWDeviceStep<Real>& step,
                               const AdamWCoefficients<Real>& coefficients, int64_t first, int count,
                               uint32_t bits, int64_t position) {
  Weight* weight = static_cast<Weight*>(m.weight);
  const Grad* grad = static_cast<const Grad*>(m.grad);
  State* exp_avg = static_cast<State*>(m.exp_avg) + position;
  State* exp_avg_sq = static_cast<State*>(m.exp_avg_sq) + position;
  bool has_master = false;
  if constexpr (sizeof(Weight) < sizeof(Real)) has_master = m.master != nullptr;
  const bool flat = lies_flat(m);
  const bool weights_aligned = is_aligned(weight);

  Pack4<Weight> weights = {};
  Pack4<Grad> grads = {};
  int64_t places[4];
  if (flat) {
    weights = load_pack(weight + first, count, weights_aligned);
    grads = load_pack(grad + first, count, is_aligned(grad));
  } else {
    int64_t row = first / m.columns, column = first - row * m.columns;
    PARTUNE_UNROLL
    for (int i = 0; i < 4; ++i) {
      places[i] = row * m.weight_row_stride + column * m.weight_column_stride;
      if (bits >> i & 1u) {
        weights.at[i] = weight[places[i]];
        grads.at[i] = grad[row * m.grad_row_stride + column * m.grad_column_stride];
      }
      if (++column == m.columns) {
        column = 0;
        ++row;
      }
    }
  }
  State average[4], square[4];
  float master[4];
  PARTUNE_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int place = count_bits(bits & ((1u << i) - 1u));
    if (bits >> i & 1u) {
      average[i] = exp_avg[place];
      square[i] = exp_avg_sq[place];
      if (has_master) master[i] = m.master[position + place];
    }
  }
  const EntryRounding rounding = entry_rounding<Weight>(m, step);
  PARTUNE_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int place = count_bits(bits & ((1u << i) - 1u));
    if (bits >> i & 1u) {
      Real value = has_master ? Real(master[i]) : widen(weights.at[i]);
      weights.at[i] = step_entry<Weight>(Real(widen(grads.at[i])), value, average[i], square[i],
                                         uint64_t(first + i), coefficients, rounding);
      exp_avg[place] = average[i];
      exp_avg_sq[place] = square[i];
      if (has_master) m.master[position + place] = float(value);
      if (!flat) weight[places[i]] = weights.at[i];
    }
  }
  if (flat) store_pack(weights, weight + first, count, weights_aligned);
}

// SASS <float, float, float>: LDG.E.128 x3, STG.E.128
// SASS <BFloat16, BFloat16, float>: LDG.E.128, LDG.E.64 x2, STG.E.64
template <typename Weight, typename Grad, typename State, typename Real, int kBlock>
__global__ void __launch_bounds__(kBlock, sizeof(Real) == 4 ? 3 : 2)
    half_elements_kernel(LAUNCH_PARAMETER(HalfLaunch<Real>) launch) {
  SHARED(AdamWCoefficients<Real>, coefficients, [1]);
  SHARED(int, warp_totals, [kBlock / 32]);
  const int number = matrix_of_block(launch.batch, int(blockIdx.x));
  const HalfMatrix& m = launch.batch.matrices[number];
  const int64_t all = entries_of(m.entries);
  const int block = int(blockIdx.x) - launch.batch.first_block[number];
  const EntryTile<kBlock> tile(block, all);
  if (threadIdx.x == 0) coefficients[0] = step_coefficients(m.entries, launch.step);
  const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
  const int64_t warp_first = tile.begin + warp * kCounterEntries;
  const PhiloxBlock mask = m.mask ? read_mask(m.mask, warp_first, all)
                                  : draw_mask(warp_first, all, m.mask_id, mask_key_of(launch.mask_seed));
  const LiveFour four = live_four(mask, lane);
  if (lane == 0) warp_totals[warp] = four.warp_total;
  __syncthreads();
  int64_t position = m.ranks[block] + four.before;
  PARTUNE_UNROLL
  for (int i = 0; i < kBlock / 32; ++i) {
    if (i < warp) position += warp_totals[i];
  }
  const bool wanted = !launch.step.found_inf || *launch.step.found_inf == 0;
  if (wanted) {
    step_live_four<Weight, Grad, State>(m.entries, launch.step, coefficients[0], tile.position, tile.count,
                                        four.bits, position);
  }
}

// ---- masks ----

// Thread i draws the mask's i-th counter.
// SASS: STG.E.128
template <int kBlock>
__global__ void __launch_bounds__(kBlock)
    random_mask_kernel(uint32_t* mask, int64_t count, const int64_t* mask_seed, uint32_t mask_id) {
  const int64_t first = (int64_t(blockIdx.x) * kBlock + threadIdx.x) * kCounterEntries;
  if (first < count) {
    const PhiloxBlock drawn = draw_mask(first, count, mask_id, mask_key_of(mask_seed));
    Pack4<uint32_t> pack;
    PARTUNE_UNROLL
    for (int i = 0; i < 4; ++i) pack.at[i] = drawn.word[i];
    store_pack(pack, mask + first / 32, 4, is_aligned(mask));
  }
}

// A warp counts the live entries of a tile, a lane those of a word.
// SASS: none (a warp reads 128 neighbouring bytes in one access)
template <int kBlock>
__global__ void __launch_bounds__(kBlock)
    mask_counts_kernel(const uint32_t* mask, int64_t count, int64_t tiles, int64_t* counts) {
  static_assert(kHalfTileWords == 32, "a lane has a word");
  const int64_t tile = int64_t(blockIdx.x) * (kBlock / 32) + threadIdx.x / 32;
  const int64_t first = tile * kHalfTile + int64_t(threadIdx.x % 32) * 32;
  int live = 0;
  if (first < count) live = count_bits(first_bits(mask[first / 32], count - first));
  PARTUNE_UNROLL
  for (int step = 1; step < 32; step *= 2) live += __shfl_xor_sync(0xffffffffu, live, step);
  if (tile < tiles && threadIdx.x % 32 == 0) counts[tile] = live;
}

}  // namespace partune
