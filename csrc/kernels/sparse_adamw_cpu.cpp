// A tile of entries is gathered into arrays that fit the L1 cache, stepped there in loops that the
// compiler turns into vectors, and scattered back. What is scattered in memory is known a tile ahead,
// so that the cache lines of the next tile are on their way while this one is computed.
#include "sparse_adamw_cpu.h"

#include "adamw_tile_cpu.h"

namespace partune {
namespace PARTUNE_ISA {
namespace {

// Where the entries of a tile are: in the matrix (row·columns + column), and in memory.
struct TileOffsets {
  int64_t index[kTile];
  int64_t weight[kTile];  // filled, like grad, only where strides make it differ from index
  int64_t grad[kTile];
};

bool weight_is_contiguous(const SparseAdamWMatrix& m) {
  return m.weight_column_stride == 1 && m.weight_row_stride == m.columns;
}
bool grad_is_contiguous(const SparseAdamWMatrix& m) {
  return m.grad_column_stride == 1 && m.grad_row_stride == m.columns;
}

// Walks the entries of a matrix in order; row is the row of the next one.
struct Cursor {
  int64_t position, row;
};

void locate(const SparseAdamWMatrix& m, Cursor& cursor, int64_t end, TileOffsets& tile) {
  const int count = int(end - cursor.position < kTile ? end - cursor.position : kTile);
  const bool strided_weight = !weight_is_contiguous(m);
  const bool strided_grad = !m.grad_is_compact && !grad_is_contiguous(m);
  for (int filled = 0; filled < count;) {
    while (m.crow_indices[cursor.row + 1] <= cursor.position) ++cursor.row;
    const int64_t left = m.crow_indices[cursor.row + 1] - cursor.position;
    const int stop = int(left < count - filled ? filled + left : count);
    const int32_t* columns = m.col_indices + cursor.position - filled;
    const int64_t row = cursor.row;
    cursor.position += stop - filled;
    for (int i = filled; i < stop; ++i) tile.index[i] = row * m.columns + columns[i];
    if (strided_weight) {
      for (int i = filled; i < stop; ++i) {
        tile.weight[i] = row * m.weight_row_stride + columns[i] * m.weight_column_stride;
      }
    }
    if (strided_grad) {
      for (int i = filled; i < stop; ++i) {
        tile.grad[i] = row * m.grad_row_stride + columns[i] * m.grad_column_stride;
      }
    }
    filled = stop;
  }
}

// Gathers a tile while asking for the cache lines of the next. Spread over this loop the requests keep
// the memory busy without filling its queue; they go to the L2 cache, whose queue is the longer one
// (measured on Zen 4: 1.6 times the speed of requests to L1).
template <typename Stored>
void gather(const Stored* source, const int64_t* offsets, const int64_t* next, int count, Stored* out) {
  for (int i = 0; i < count; ++i) {
    __builtin_prefetch(source + next[i], 0, 2);
    out[i] = source[offsets[i]];
  }
}

// The same for weights and gradients that lie alike.
template <typename Weight, typename Grad>
void gather_both(const Weight* weight, const Grad* grad, const int64_t* offsets, const int64_t* next,
                 int count, Weight* weight_out, Grad* grad_out) {
  for (int i = 0; i < count; ++i) {
    __builtin_prefetch(weight + next[i], 0, 2);
    __builtin_prefetch(grad + next[i], 0, 2);
    weight_out[i] = weight[offsets[i]];
    grad_out[i] = grad[offsets[i]];
  }
}

template <typename Weight, typename Grad, typename State, typename Real>
class Stepper {
 public:
  Stepper(const SparseAdamWMatrix& m, const SparseAdamWStep& s)
      : m_(m), is_sparse_(m.crow_indices != nullptr), stepper_(m, s) {}

  void run(int64_t begin, int64_t end) {
    TileOffsets offsets[2];
    Cursor cursor{begin, is_sparse_ ? row_of(m_.crow_indices, 0, m_.rows - 1, begin) : 0};
    if (is_sparse_) locate(m_, cursor, end, offsets[0]);
    int parity = 0;
    for (int64_t tile = begin; tile < end; tile += kTile, parity ^= 1) {
      const int count = int(end - tile < kTile ? end - tile : kTile);
      TileOffsets& now = offsets[parity];
      const bool next_is_full = tile + 2 * int64_t(kTile) <= end;
      if (is_sparse_) {
        if (tile + kTile < end) locate(m_, cursor, end, offsets[parity ^ 1]);
      } else {
        for (int i = 0; i < count; ++i) now.index[i] = tile + i;
      }
      step_tile(tile, count, now, next_is_full ? offsets[parity ^ 1] : now);
    }
  }

 private:
  const int64_t* weight_offsets(const TileOffsets& tile) const {
    return weight_is_contiguous(m_) ? tile.index : tile.weight;
  }
  const int64_t* grad_offsets(const TileOffsets& tile) const {
    return grad_is_contiguous(m_) ? tile.index : tile.grad;
  }

  void gather_tile(int count, const TileOffsets& now, const TileOffsets& next) {
    const Weight* weight = static_cast<const Weight*>(m_.weight);
    const Grad* grad = static_cast<const Grad*>(m_.grad);
    const bool wants_weight = !stepper_.has_master(), wants_grad = !m_.grad_is_compact;
    if (wants_weight && wants_grad && weight_offsets(now) == grad_offsets(now)) {
      gather_both(weight, grad, now.index, next.index, count, raw_weight_, raw_grad_);
      return;
    }
    if (wants_weight) {
      gather(weight, weight_offsets(now), weight_offsets(next), count, raw_weight_);
    } else {
      const int64_t* ahead = weight_offsets(next);
      for (int i = 0; i < count; ++i) __builtin_prefetch(weight + ahead[i], 1, 2);
    }
    if (wants_grad) gather(grad, grad_offsets(now), grad_offsets(next), count, raw_grad_);
  }

  void step_tile(int64_t tile, int count, const TileOffsets& now, const TileOffsets& next) {
    if (is_sparse_) gather_tile(count, now, next);
    const bool grad_in_place = !is_sparse_ || m_.grad_is_compact;
    stepper_.step(tile, count, is_sparse_ ? raw_weight_ : static_cast<Weight*>(m_.weight) + tile,
                  grad_in_place ? static_cast<Grad*>(const_cast<void*>(m_.grad)) + tile : raw_grad_,
                  now.index);
    if (is_sparse_) scatter(raw_weight_, weight_offsets(now), count, static_cast<Weight*>(m_.weight));
  }

  const SparseAdamWMatrix& m_;
  const bool is_sparse_;
  TileStepper<Weight, Grad, State, Real> stepper_;
  Weight raw_weight_[kTile];
  Grad raw_grad_[kTile];
};

template <typename Weight, typename Grad, typename State, typename Real>
void step(const SparseAdamWMatrix& m, const SparseAdamWStep& s, int64_t begin, int64_t end) {
  if (begin < end) Stepper<Weight, Grad, State, Real>(m, s).run(begin, end);
}

template <typename Grad, typename Real>
bool found_inf(const SparseAdamWMatrix& m, int64_t begin, int64_t end) {
  if (begin >= end) return false;
  const bool scattered = m.crow_indices && !m.grad_is_compact;
  TileOffsets offsets;
  Grad gathered[kTile];
  Real wide[kTile];
  Cursor cursor{begin, scattered ? row_of(m.crow_indices, 0, m.rows - 1, begin) : 0};
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int count = int(end - tile < kTile ? end - tile : kTile);
    Grad* stored = static_cast<Grad*>(const_cast<void*>(m.grad)) + tile;
    if (scattered) {
      locate(m, cursor, end, offsets);
      const int64_t* where = grad_is_contiguous(m) ? offsets.index : offsets.grad;
      gather(static_cast<const Grad*>(m.grad), where, where, count, gathered);
      stored = gathered;
    }
    const Real* values = widened(stored, count, wide);
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
