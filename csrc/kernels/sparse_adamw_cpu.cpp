// A tile of entries is gathered into arrays that fit the L1 cache, stepped there in loops that the
// compiler turns into vectors, and scattered back. While one tile is computed, the cache lines of
// the next are on their way: what is scattered in memory is known a tile ahead.
#include "sparse_adamw_cpu.h"

#ifndef PARTUNE_ISA
#error "PARTUNE_ISA names the namespace, and so the instruction set, that this file is built for"
#endif

namespace partune {
namespace PARTUNE_ISA {
namespace {

constexpr int kTile = 512;

struct TileOffsets {
  int64_t index[kTile];   // row·columns + column
  int64_t weight[kTile];  // where that is in memory, in elements
  int64_t grad[kTile];
};

// Walks the entries of a matrix in order; row is the row of the next one.
struct Cursor {
  int64_t position, row;
};

template <typename Weight, typename Grad>
int prepare(const SparseAdamWMatrix& m, Cursor& cursor, int64_t end, bool touch_grad, TileOffsets& tile) {
  const int count = int(end - cursor.position < kTile ? end - cursor.position : kTile);
  const bool weight_is_contiguous = m.weight_column_stride == 1 && m.weight_row_stride == m.columns;
  const bool grad_is_contiguous = m.grad_column_stride == 1 && m.grad_row_stride == m.columns;
  for (int filled = 0; filled < count;) {
    while (m.crow_indices[cursor.row + 1] <= cursor.position) ++cursor.row;
    const int64_t left = m.crow_indices[cursor.row + 1] - cursor.position;
    const int stop = int(left < count - filled ? filled + left : count);
    const int32_t* columns = m.col_indices + cursor.position - filled;
    const int64_t row = cursor.row;
    cursor.position += stop - filled;
    for (int i = filled; i < stop; ++i) tile.index[i] = row * m.columns + columns[i];
    if (!weight_is_contiguous) {
      for (int i = filled; i < stop; ++i) {
        tile.weight[i] = row * m.weight_row_stride + columns[i] * m.weight_column_stride;
      }
    }
    if (touch_grad && !grad_is_contiguous) {
      for (int i = filled; i < stop; ++i) {
        tile.grad[i] = row * m.grad_row_stride + columns[i] * m.grad_column_stride;
      }
    }
    filled = stop;
  }
  const int64_t* weights = weight_is_contiguous ? tile.index : tile.weight;
  const Weight* weight = static_cast<const Weight*>(m.weight);
  for (int i = 0; i < count; ++i) __builtin_prefetch(weight + weights[i], 1, 3);
  if (touch_grad) {
    const int64_t* grads = grad_is_contiguous ? tile.index : tile.grad;
    const Grad* grad = static_cast<const Grad*>(m.grad);
    for (int i = 0; i < count; ++i) __builtin_prefetch(grad + grads[i], 0, 3);
  }
  return count;
}

// Gathers raw bits first and widens in a loop of its own, which then has no scattered access.
template <typename Stored, typename Real>
void gather(const void* from, const int64_t* offsets, int count, Real* out) {
  const Stored* source = static_cast<const Stored*>(from);
  Stored raw[kTile];
  for (int i = 0; i < count; ++i) raw[i] = source[offsets[i]];
  for (int i = 0; i < count; ++i) out[i] = widen(raw[i]);
}

template <typename Stored, typename Real>
void load(const void* from, int64_t begin, int count, Real* out) {
  const Stored* source = static_cast<const Stored*>(from) + begin;
  for (int i = 0; i < count; ++i) out[i] = widen(source[i]);
}

template <typename Stored, typename Real>
void round_tile(const Real* values, const uint32_t* random, int count, Stored* out) {
  if (random) {
    for (int i = 0; i < count; ++i) round_stochastic(values[i], random[i], out[i]);
  } else {
    for (int i = 0; i < count; ++i) round_nearest(values[i], out[i]);
  }
}

struct TileRandom {
  uint32_t weight[kTile], exp_avg[kTile], exp_avg_sq[kTile];
};

void draw(const int64_t* index, int count, uint32_t step, uint32_t parameter_id, PhiloxKey key,
          TileRandom& random) {
  for (int i = 0; i < count; ++i) {
    const PhiloxBlock block = philox(uint64_t(index[i]), step, parameter_id, key);
    random.weight[i] = block.word[0];
    random.exp_avg[i] = block.word[1];
    random.exp_avg_sq[i] = block.word[2];
  }
}

template <typename Real>
struct TileValues {
  Real grad[kTile], weight[kTile], exp_avg[kTile], exp_avg_sq[kTile];
};

template <typename Real>
void update(TileValues<Real>& tile, int count, const AdamWCoefficients<Real>& coefficients) {
  const AdamWCoefficients<Real> c = coefficients;
#pragma GCC ivdep
  for (int i = 0; i < count; ++i) {
    adamw_update(tile.grad[i], tile.weight[i], tile.exp_avg[i], tile.exp_avg_sq[i], c);
  }
}

template <typename Real>
AdamWCoefficients<Real> coefficients_of(const SparseAdamWMatrix& m, const SparseAdamWStep& s) {
  const AdamWHyperparameters<double>& h = s.hyperparameters;
  const AdamWHyperparameters<Real> narrowed{
      Real(h.beta1), Real(h.one_minus_beta1), Real(h.beta2), Real(h.one_minus_beta2), Real(h.weight_decay),
      Real(h.eps),   h.corrected,             h.maximize,    h.stochastic};
  return adamw_coefficients(narrowed, Real(s.lr), Real(s.grad_scale), uint32_t(*m.state_step));
}

template <typename Weight, typename Grad, typename State, typename Real>
void step(const SparseAdamWMatrix& m, const SparseAdamWStep& s, int64_t begin, int64_t end) {
  if (begin >= end) return;
  constexpr bool kRoundedState = sizeof(State) < sizeof(Real);
  constexpr bool kRoundedWeight = sizeof(Weight) < sizeof(Real);
  const bool stochastic = kRoundedWeight && !m.master && s.hyperparameters.stochastic;
  const bool is_sparse = m.col_indices != nullptr;
  const bool scattered_grad = is_sparse && !m.grad_is_compact;
  const bool weight_is_contiguous = m.weight_column_stride == 1 && m.weight_row_stride == m.columns;
  const bool grad_is_contiguous = m.grad_column_stride == 1 && m.grad_row_stride == m.columns;
  const AdamWCoefficients<Real> coefficients = coefficients_of<Real>(m, s);
  const uint32_t draw_step = uint32_t(*m.state_step) + s.offset;

  TileOffsets offsets[2];
  TileValues<Real> values;
  TileRandom random;
  Weight rounded[kTile];
  Cursor cursor{begin, is_sparse ? row_of(m.crow_indices, 0, m.rows - 1, begin) : 0};
  if (is_sparse) prepare<Weight, Grad>(m, cursor, end, scattered_grad, offsets[0]);

  for (int64_t tile = begin, parity = 0; tile < end; tile += kTile, parity ^= 1) {
    const int count = int(end - tile < kTile ? end - tile : kTile);
    TileOffsets& now = offsets[parity];
    const int64_t* weight_offsets = weight_is_contiguous ? now.index : now.weight;
    if (!is_sparse) {
      for (int i = 0; i < count; ++i) now.index[i] = tile + i;
    } else if (tile + kTile < end) {
      prepare<Weight, Grad>(m, cursor, end, scattered_grad, offsets[parity ^ 1]);
    }

    if (scattered_grad) {
      gather<Grad>(m.grad, grad_is_contiguous ? now.index : now.grad, count, values.grad);
    } else {
      load<Grad>(m.grad, tile, count, values.grad);
    }
    if (kRoundedWeight && m.master) {
      load<float>(m.master, tile, count, values.weight);
    } else if (is_sparse) {
      gather<Weight>(m.weight, weight_offsets, count, values.weight);
    } else {
      load<Weight>(m.weight, tile, count, values.weight);
    }
    load<State>(m.exp_avg, tile, count, values.exp_avg);
    load<State>(m.exp_avg_sq, tile, count, values.exp_avg_sq);

    update(values, count, coefficients);

    if (stochastic || kRoundedState) draw(now.index, count, draw_step, m.parameter_id, s.key, random);
    round_tile(values.exp_avg, kRoundedState ? random.exp_avg : nullptr, count,
               static_cast<State*>(m.exp_avg) + tile);
    round_tile(values.exp_avg_sq, kRoundedState ? random.exp_avg_sq : nullptr, count,
               static_cast<State*>(m.exp_avg_sq) + tile);
    if (kRoundedWeight && m.master) {
      for (int i = 0; i < count; ++i) m.master[tile + i] = float(values.weight[i]);
    }
    const uint32_t* weight_random = stochastic ? random.weight : nullptr;
    Weight* weight = static_cast<Weight*>(m.weight);
    if (is_sparse) {
      round_tile(values.weight, weight_random, count, rounded);
      for (int i = 0; i < count; ++i) weight[weight_offsets[i]] = rounded[i];
    } else {
      round_tile(values.weight, weight_random, count, weight + tile);
    }
  }
}

template <typename Grad, typename Real>
bool found_inf(const SparseAdamWMatrix& m, int64_t begin, int64_t end) {
  if (begin >= end) return false;
  const bool scattered = m.col_indices && !m.grad_is_compact;
  const bool is_contiguous = m.grad_column_stride == 1 && m.grad_row_stride == m.columns;
  TileOffsets offsets;
  Real values[kTile];
  Cursor cursor{begin, scattered ? row_of(m.crow_indices, 0, m.rows - 1, begin) : 0};
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int count = int(end - tile < kTile ? end - tile : kTile);
    if (scattered) {
      prepare<Grad, Grad>(m, cursor, end, true, offsets);
      gather<Grad>(m.grad, is_contiguous ? offsets.index : offsets.grad, count, values);
    } else {
      load<Grad>(m.grad, tile, count, values);
    }
    int bad = 0;
    for (int i = 0; i < count; ++i) bad |= !(values[i] - values[i] == Real(0));
    if (bad) return true;
  }
  return false;
}

}  // namespace

const SparseAdamWCpu sparse_adamw_cpu = {
    {
        step<double, double, double, double>,
        step<float, float, float, float>,
        step<float, float, BFloat16, float>,
        step<BFloat16, BFloat16, float, float>,
        step<BFloat16, BFloat16, BFloat16, float>,
        step<BFloat16, float, float, float>,
        step<BFloat16, float, BFloat16, float>,
        step<Half, Half, float, float>,
        step<Half, Half, BFloat16, float>,
        step<Half, float, float, float>,
        step<Half, float, BFloat16, float>,
    },
    found_inf<double, double>,
    found_inf<float, float>,
    found_inf<BFloat16, float>,
    found_inf<Half, float>,
};

}  // namespace PARTUNE_ISA
}  // namespace partune
