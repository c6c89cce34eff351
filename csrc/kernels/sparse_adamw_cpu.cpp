// A tile of entries is gathered into arrays that fit the L1 cache, stepped there in loops that the
// compiler turns into vectors, and scattered back. What is scattered in memory is known some tiles ahead,
// so that their cache lines are on their way while this one is computed.
#include "sparse_adamw_cpu.h"

#include "adamw_tile_cpu.h"

namespace partune {
namespace PARTUNE_ISA {
namespace {

constexpr int kTile = 64;        // short enough that arithmetic overlaps the neighbours' waits for memory
constexpr int kAhead = 2;        // tiles between the request of a line and its use
constexpr int kDenseTile = 256;  // where all entries are stepped, which needs no such waits

// Where the entries of a tile are: in the matrix (row·columns + column), and in memory.
struct TileOffsets {
  int64_t index[kTile + kWords];
  int64_t weight[kTile + kWords];  // filled, like grad, only where strides make it differ from index
  int64_t grad[kTile + kWords];
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

// out[i] = base + columns[i]·stride. In whole vectors where `beyond` says that kWords more columns can
// be read; out has room for them.
PARTUNE_FN void place_columns(const int32_t* columns, int count, int64_t base, int64_t stride, bool beyond,
                              int64_t* out) {
  if (!beyond) {
    for (int i = 0; i < count; ++i) out[i] = base + columns[i] * stride;
    return;
  }
  for (int i = 0; i < count; i += kWords) {
    for (int lane = i; lane < i + kWords; ++lane) out[lane] = base + columns[lane] * stride;
  }
}

void locate(const SparseAdamWMatrix& m, Cursor& cursor, int64_t end, TileOffsets& tile) {
  const int count = int(end - cursor.position < kTile ? end - cursor.position : kTile);
  const bool strided_weight = !weight_is_contiguous(m);
  const bool strided_grad = !m.grad_is_compact && !grad_is_contiguous(m);
  for (int filled = 0; filled < count;) {
    while (m.crow_indices[cursor.row + 1] <= cursor.position) ++cursor.row;
    const int64_t left = m.crow_indices[cursor.row + 1] - cursor.position;
    const int here = int(left < count - filled ? left : count - filled);
    const int32_t* columns = m.col_indices + cursor.position;
    const int64_t row = cursor.row;
    const bool beyond = cursor.position + here + kWords <= m.nnz;
    place_columns(columns, here, row * m.columns, 1, beyond, tile.index + filled);
    if (strided_weight) {
      place_columns(columns, here, row * m.weight_row_stride, m.weight_column_stride, beyond,
                    tile.weight + filled);
    }
    if (strided_grad) {
      place_columns(columns, here, row * m.grad_row_stride, m.grad_column_stride, beyond, tile.grad + filled);
    }
    cursor.position += here;
    filled += here;
  }
}

// Asks for a cache line that a later tile gathers from, in the L2 cache: its queue of misses is longer
// than L1's.
template <typename Stored>
void request(const Stored* line) {
  __builtin_prefetch(line, 0, 2);
}

// Gathers a tile while asking for the lines of the one that comes kAhead tiles later. Spread over this
// loop the requests keep the memory busy without filling its queue. They go through a whole tile in steps: in
// ascending order the machine's own prefetcher takes them for a stream, and fetches what lies in between,
// which nobody needs (measured at 4096 by 4096, 5 %: a tenth of the time).
template <unsigned kStep, typename... Stored>
PARTUNE_FN void gather_in_steps(const int64_t* offsets, const int64_t* ahead, int count,
                                const Stored*... source, Stored*... out) {
  int i = 0;
  for (; i + kGathered <= count; i += kGathered) {
    for (int lane = 0; lane < kGathered; ++lane) {
      const int64_t later = ahead[unsigned(i + lane) * kStep % kTile];
      (request(source + later), ...);
    }
    (gather_lanes(source, offsets + i, out + i), ...);
  }
  for (; i < count; ++i) {
    (request(source + ahead[i]), ...);
    ((out[i] = source[offsets[i]]), ...);
  }
}

template <typename Stored>
PARTUNE_FN void gather(const Stored* source, const int64_t* offsets, const int64_t* ahead, int count,
                       Stored* out) {
  if (count == kTile) return gather_in_steps<5, Stored>(offsets, ahead, kTile, source, out);
  gather_in_steps<1, Stored>(offsets, ahead, count, source, out);
}

// The same for weights and gradients that lie alike.
template <typename Weight, typename Grad>
PARTUNE_FN void gather_both(const Weight* weight, const Grad* grad, const int64_t* offsets,
                            const int64_t* ahead, int count, Weight* weight_out, Grad* grad_out) {
  if (count == kTile) {
    return gather_in_steps<5, Weight, Grad>(offsets, ahead, kTile, weight, grad, weight_out, grad_out);
  }
  gather_in_steps<1, Weight, Grad>(offsets, ahead, count, weight, grad, weight_out, grad_out);
}

// Steps the entries of a CSR.
template <typename Weight, typename Grad, typename State, typename Real>
class SparseStepper {
 public:
  SparseStepper(const SparseAdamWMatrix& m, const SparseAdamWStep& s) : m_(m), stepper_(m, s) {}

  void run(int64_t begin, int64_t end) {
    TileOffsets ring[kAhead + 1];  // the tile at `place`, then those to come
    Cursor cursor{begin, row_of(m_.crow_indices, 0, m_.rows - 1, begin)};
    for (int i = 0; i < kAhead && cursor.position < end; ++i) {
      const int count = int(end - cursor.position < kTile ? end - cursor.position : kTile);
      locate(m_, cursor, end, ring[i]);
      request_tile(count, ring[i]);
    }
    int place = 0;
    for (int64_t tile = begin; tile < end; tile += kTile) {
      const int count = int(end - tile < kTile ? end - tile : kTile);
      TileOffsets& now = ring[place];
      TileOffsets& ahead = ring[place == 0 ? kAhead : place - 1];
      const bool ahead_is_full = tile + (kAhead + 1) * int64_t(kTile) <= end;
      if (cursor.position < end) locate(m_, cursor, end, ahead);
      step_tile(tile, count, now, ahead_is_full ? ahead : now);
      place = place == kAhead ? 0 : place + 1;
    }
  }

 private:
  const int64_t* weight_offsets(const TileOffsets& tile) const {
    return weight_is_contiguous(m_) ? tile.index : tile.weight;
  }
  const int64_t* grad_offsets(const TileOffsets& tile) const {
    return grad_is_contiguous(m_) ? tile.index : tile.grad;
  }

  void request_tile(int count, const TileOffsets& tile) const {
    const int64_t* weight = weight_offsets(tile);
    const int64_t* grad = grad_offsets(tile);
    for (int i = 0; i < count; ++i) {
      request(static_cast<const Weight*>(m_.weight) + weight[i]);
      if (!m_.grad_is_compact) request(static_cast<const Grad*>(m_.grad) + grad[i]);
    }
  }

  void gather_tile(int count, const TileOffsets& now, const TileOffsets& ahead) {
    const Weight* weight = static_cast<const Weight*>(m_.weight);
    const Grad* grad = static_cast<const Grad*>(m_.grad);
    const bool wants_weight = !stepper_.has_master(), wants_grad = !m_.grad_is_compact;
    if (wants_weight && wants_grad && weight_offsets(now) == grad_offsets(now)) {
      gather_both(weight, grad, now.index, ahead.index, count, raw_weight_, raw_grad_);
      return;
    }
    if (wants_weight) {
      gather(weight, weight_offsets(now), weight_offsets(ahead), count, raw_weight_);
    } else {
      const int64_t* offsets = weight_offsets(ahead);
      for (int i = 0; i < count; ++i) request(weight + offsets[i]);
    }
    if (wants_grad) gather(grad, grad_offsets(now), grad_offsets(ahead), count, raw_grad_);
  }

  void step_tile(int64_t tile, int count, const TileOffsets& now, const TileOffsets& ahead) {
    gather_tile(count, now, ahead);
    Grad* grad = raw_grad_;
    if (m_.grad_is_compact) {
      grad = static_cast<Grad*>(const_cast<void*>(m_.grad)) + tile;
      request_page(grad, count);
    }
    stepper_.step(tile, count, raw_weight_, grad, now.index);
    scatter(raw_weight_, weight_offsets(now), count, static_cast<Weight*>(m_.weight));
  }

  const SparseAdamWMatrix& m_;
  TileStepper<Weight, Grad, State, Real, kTile> stepper_;
  Weight raw_weight_[kTile];
  Grad raw_grad_[kTile];
};

// Steps entries [begin, end) of a dense parameter, where they are.
template <typename Weight, typename Grad, typename State, typename Real>
void step_dense(const SparseAdamWMatrix& m, const SparseAdamWStep& s, int64_t begin, int64_t end) {
  TileStepper<Weight, Grad, State, Real, kDenseTile> stepper(m, s);
  int64_t index[kDenseTile];
  for (int64_t tile = begin; tile < end; tile += kDenseTile) {
    const int count = int(end - tile < kDenseTile ? end - tile : kDenseTile);
    Weight* weight = static_cast<Weight*>(m.weight) + tile;
    Grad* grad = static_cast<Grad*>(const_cast<void*>(m.grad)) + tile;
    if (stepper.draws()) {
      for (int i = 0; i < count; ++i) index[i] = tile + i;
    }
    request_page(weight, count);
    request_page(grad, count);
    stepper.step(tile, count, weight, grad, index);
  }
}

template <typename Weight, typename Grad, typename State, typename Real>
void step(const SparseAdamWMatrix& m, const SparseAdamWStep& s, int64_t begin, int64_t end) {
  if (begin >= end) return;
  if (m.crow_indices) {
    SparseStepper<Weight, Grad, State, Real>(m, s).run(begin, end);
  } else {
    step_dense<Weight, Grad, State, Real>(m, s, begin, end);
  }
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
