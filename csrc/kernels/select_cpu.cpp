#include "select_cpu.h"

#include "philox_cpu.h"
#include "vector.h"

#ifndef PARTUNE_ISA
#error "PARTUNE_ISA names the namespace, and so the instruction set, that this file is built for"
#endif

namespace partune {
namespace PARTUNE_ISA {
namespace {

constexpr int kTile = 512;

// ---- keys of a row, a tile at a time ----

template <typename Real, typename Key>
void keys_of(const Real* scores, int count, bool largest, Key* keys) {
  if (largest) {
    for (int i = 0; i < count; ++i) keys[i] = score_key(scores[i], true);
  } else {
    for (int i = 0; i < count; ++i) keys[i] = score_key(scores[i], false);
  }
}

template <typename Real>
void histogram(const Real* scores, int64_t count, bool largest, KeyRange<typename KeyOf<Real>::Type> range,
               int shift, int64_t* counts) {
  using Key = typename KeyOf<Real>::Type;
  const Key width = range.last - range.first;
  Key keys[kTile];
  for (int64_t tile = 0; tile < count; tile += kTile) {
    const int size = int(count - tile < kTile ? count - tile : kTile);
    keys_of(scores + tile, size, largest, keys);
    for (int i = 0; i < size; ++i) {
      const Key offset = keys[i] - range.first;
      if (offset <= width) ++counts[offset >> shift];
    }
  }
}

template <typename Real>
void collect(const Real* scores, int64_t count, bool largest, KeyRange<typename KeyOf<Real>::Type> range,
             int64_t* above, int64_t* inside, typename KeyOf<Real>::Type* found) {
  using Key = typename KeyOf<Real>::Type;
  Key keys[kTile];
  int64_t above_count = 0, inside_count = 0;
  for (int64_t tile = 0; tile < count; tile += kTile) {
    const int size = int(count - tile < kTile ? count - tile : kTile);
    keys_of(scores + tile, size, largest, keys);
    int above_here = 0, not_below_here = 0;
    for (int i = 0; i < size; ++i) {
      above_here += keys[i] > range.last;
      not_below_here += keys[i] >= range.first;
    }
    const int inside_here = not_below_here - above_here;
    if (found && inside_here) {
      Key* out = found + inside_count;
      for (int i = 0; i < size; ++i) {
        if (keys[i] >= range.first && keys[i] <= range.last) *out++ = keys[i];
      }
    }
    above_count += above_here;
    inside_count += inside_here;
  }
  *above = above_count;
  *inside = inside_count;
}

template <typename Real>
void emit(const Real* scores, int64_t count, bool largest, typename KeyOf<Real>::Type threshold, int64_t ties,
          int32_t* columns) {
  using Key = typename KeyOf<Real>::Type;
  Key keys[kTile];
  alignas(64) uint8_t wanted[kTile];
  for (int64_t tile = 0; tile < count; tile += kTile) {
    const int size = int(count - tile < kTile ? count - tile : kTile);
    keys_of(scores + tile, size, largest, keys);
    for (int i = 0; i < size; ++i) wanted[i] = keys[i] >= threshold;
    for (int i = size; i % 8; ++i) wanted[i] = 0;
    for (int eight = 0; eight < size; eight += 8) {
      uint64_t flags;
      __builtin_memcpy(&flags, wanted + eight, sizeof flags);
      for (; flags; flags &= flags - 1) {
        const int i = eight + __builtin_ctzll(flags) / 8;
        if (keys[i] == threshold && ties-- <= 0) continue;
        *columns++ = int32_t(tile + i);
      }
    }
  }
}

// ---- the product of two thin factors ----

// A block of kBlockRows × kBlockVectors registers; with the operands it fills the register file.
constexpr int kBlockRows = 6;
constexpr int kBlockVectors = kVectorBytes == 64 ? 4 : 2;
template <typename Real>
constexpr int kBlockColumns = kBlockVectors * kLanes<Real>;

// [rank, kBlockColumns] of right, contiguous and padded with zeros.
template <typename Real>
void pack(const Real* right, int64_t rank, int64_t columns, int width, Real* packed) {
  for (int64_t k = 0; k < rank; ++k) {
    for (int j = 0; j < width; ++j) packed[k * kBlockColumns<Real> + j] = right[k * columns + j];
    for (int j = width; j < kBlockColumns<Real>; ++j) packed[k * kBlockColumns<Real> + j] = 0;
  }
}

template <int Rows, typename Real>
void product_block(const Real* left, const Real* packed, int64_t rank, int64_t columns, int width,
                   Real* out) {
  using V = Vector<Real>;
  constexpr int W = kLanes<Real>;
  V sum[Rows][kBlockVectors] = {};
  for (int64_t k = 0; k < rank; ++k) {
    V b[kBlockVectors];
    PARTUNE_UNROLL
    for (int v = 0; v < kBlockVectors; ++v) b[v] = load_vector(packed + k * kBlockColumns<Real> + v * W);
    PARTUNE_UNROLL
    for (int i = 0; i < Rows; ++i) {
      const V a = V{} + left[i * rank + k];
      PARTUNE_UNROLL
      for (int v = 0; v < kBlockVectors; ++v) sum[i][v] = multiply_add(a, b[v], sum[i][v]);
    }
  }
  PARTUNE_UNROLL
  for (int i = 0; i < Rows; ++i) {
    Real row[kBlockColumns<Real>];
    PARTUNE_UNROLL
    for (int v = 0; v < kBlockVectors; ++v) store_vector(sum[i][v], row + v * W);
    for (int j = 0; j < width; ++j) out[i * columns + j] = row[j] < 0 ? -row[j] : row[j];
  }
}

template <typename Real>
void product(const Real* left, const Real* right, int64_t rows, int64_t rank, int64_t columns, Real* packed,
             Real* out) {
  for (int64_t j = 0; j < columns; j += kBlockColumns<Real>) {
    const int width = int(columns - j < kBlockColumns<Real> ? columns - j : kBlockColumns<Real>);
    pack(right + j, rank, columns, width, packed);
    int64_t i = 0;
    for (; i + kBlockRows <= rows; i += kBlockRows) {
      product_block<kBlockRows>(left + i * rank, packed, rank, columns, width, out + i * columns + j);
    }
    for (; i < rows; ++i) {
      product_block<1>(left + i * rank, packed, rank, columns, width, out + i * columns + j);
    }
  }
}

template <typename Real>
int64_t packed_size(int64_t rank) {
  return rank * kBlockColumns<Real>;
}

template <typename Stored>
void widen_row(const Stored* scores, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = widen(scores[i]);
}

void random(int64_t begin, int64_t end, uint32_t step, uint32_t parameter_id, PhiloxKey key, float* scores) {
  Words lanes = {};
  for (int i = 0; i < kWords; ++i) lanes[i] = uint64_t(i);
  uint32_t drawn[kWords];
  for (int64_t i = begin; i < end; i += kWords) {
    store_low_halves(philox(lanes + uint64_t(i), step, parameter_id, key).word[0], drawn);
    const int count = int(end - i < kWords ? end - i : kWords);
    for (int j = 0; j < count; ++j) scores[i + j] = uniform_from_bits(drawn[j]);
  }
}

template <typename Real>
constexpr SelectBodies<Real> kBodies = {histogram<Real>, collect<Real>, emit<Real>, product<Real>,
                                        packed_size<Real>};

}  // namespace

const SelectCpu select_cpu = {kBodies<float>, kBodies<double>, widen_row<BFloat16>, widen_row<Half>, random};

}  // namespace PARTUNE_ISA
}  // namespace partune
