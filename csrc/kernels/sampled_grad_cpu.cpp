#include "sampled_grad_cpu.h"

#include "vector.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef PARTUNE_ISA
#error "PARTUNE_ISA names the namespace, and so the instruction set, that this file is built for"
#endif

namespace partune {
namespace PARTUNE_ISA {
namespace {

PARTUNE_FN int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PARTUNE_FN int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- packing: tiles of lanes × lanes, transposed ----

template <typename Real>
using Tile = Vector<Real>[kLanes<Real>];

#if defined(__AVX512F__)
// Interleaving vector i with vector i + 8, four times over, is the transpose.
PARTUNE_FN void transpose(Tile<float>& tile) {
  const __m512i low =
      _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high =
      _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  PARTUNE_UNROLL
  for (int round = 0; round < 4; ++round) {
    Tile<float> next;
    PARTUNE_UNROLL
    for (int i = 0; i < 8; ++i) {
      next[2 * i] = (Vector<float>)_mm512_permutex2var_ps((__m512)tile[i], low, (__m512)tile[i + 8]);
      next[2 * i + 1] = (Vector<float>)_mm512_permutex2var_ps((__m512)tile[i], high, (__m512)tile[i + 8]);
    }
    PARTUNE_UNROLL
    for (int i = 0; i < 16; ++i) tile[i] = next[i];
  }
}
PARTUNE_FN Vector<float> widen_lanes(const BFloat16* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return (Vector<float>)_mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, bits), 16);
}
PARTUNE_FN Vector<float> widen_lanes(const Half* from) {
  return (Vector<float>)_mm512_maskz_cvtph_ps(0xffff,
                                              _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
#else
template <typename Stored>
PARTUNE_FN Vector<float> widen_lanes(const Stored* from) {
  Vector<float> lanes;
  for (int i = 0; i < kLanes<float>; ++i) lanes[i] = widen(from[i]);
  return lanes;
}
#endif
PARTUNE_FN Vector<float> widen_lanes(const float* from) { return load_vector(from); }
PARTUNE_FN Vector<double> widen_lanes(const double* from) { return load_vector(from); }

template <typename Real, int kSize>
PARTUNE_FN void transpose_lanes(Vector<Real> (&tile)[kSize]) {
  Real from[kSize][kSize], to[kSize][kSize];
  __builtin_memcpy(from, tile, sizeof from);
  PARTUNE_UNROLL
  for (int i = 0; i < kSize; ++i) {
    PARTUNE_UNROLL
    for (int j = 0; j < kSize; ++j) to[i][j] = from[j][i];
  }
  __builtin_memcpy(tile, to, sizeof to);
}
PARTUNE_FN void transpose(Tile<double>& tile) { transpose_lanes<double>(tile); }
#if !defined(__AVX512F__)
PARTUNE_FN void transpose(Tile<float>& tile) { transpose_lanes<float>(tile); }
#endif

// `tokens` × `columns` of a tile; zeros beyond.
template <typename Stored, typename Real>
void pack_edge(const Stored* factor, int64_t stride, int64_t tokens, int64_t columns, Real* packed) {
  for (int64_t column = 0; column < columns; ++column) {
    for (int64_t token = 0; token < kLanes<Real>; ++token) {
      const bool valid = token < tokens;
      packed[column * kTokenBlock<Real> + token] = valid ? Real(widen(factor[token * stride + column])) : 0;
    }
  }
}

template <typename Stored, typename Real>
void pack(const void* from, int64_t stride, int64_t tokens, int64_t begin, int64_t end, Real* packed) {
  constexpr int64_t kSize = kLanes<Real>;
  const Stored* factor = static_cast<const Stored*>(from);
  for (int64_t token = 0; token < tokens; token += kSize) {
    const Stored* rows = factor + token * stride;
    for (int64_t column = begin; column < end; column += kSize) {
      Real* to = packed + column * kTokenBlock<Real> + token;
      if (token + kSize > tokens || column + kSize > end) {
        pack_edge(rows + column, stride, smaller(tokens - token, kSize), smaller(end - column, kSize), to);
        continue;
      }
      Tile<Real> tile;
      PARTUNE_UNROLL
      for (int i = 0; i < kSize; ++i) tile[i] = widen_lanes(rows + i * stride + column);
      transpose(tile);
      PARTUNE_UNROLL
      for (int i = 0; i < kSize; ++i) store_vector(tile[i], to + i * kTokenBlock<Real>);
    }
  }
}

// ---- dot products ----

constexpr int kDots = kVectorBytes == 64 ? 8 : 4;  // so many at once: independent sums hide the latency

// The sums over the lanes of kDots vectors, each in the same order wherever it stands.
PARTUNE_FN void sum_lanes(const Vector<double> (&sums)[kDots], double* out) {
  for (int i = 0; i < kDots; ++i) {
    double lanes[kLanes<double>];
    store_vector(sums[i], lanes);
    for (int width = kLanes<double> / 2; width > 0; width /= 2) {
      for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
    }
    out[i] = lanes[0];
  }
}

#if defined(__x86_64__)
PARTUNE_FN __m128 quarter_sum(Vector<float> v) {
#if defined(__AVX512F__)
  __m256 halves[2];
  __builtin_memcpy(halves, &v, sizeof halves);
  const __m256 half = _mm256_add_ps(halves[0], halves[1]);
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
  return _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
#else
  return (__m128)v;
#endif
}

PARTUNE_FN void sum_lanes(const Vector<float> (&sums)[kDots], float* out) {
  PARTUNE_UNROLL
  for (int i = 0; i < kDots; i += 4) {
    __m128 a = quarter_sum(sums[i]), b = quarter_sum(sums[i + 1]);
    __m128 c = quarter_sum(sums[i + 2]), d = quarter_sum(sums[i + 3]);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    _mm_storeu_ps(out + i, _mm_add_ps(_mm_add_ps(a, c), _mm_add_ps(b, d)));
  }
}
#else
PARTUNE_FN void sum_lanes(const Vector<float> (&sums)[kDots], float* out) {
  for (int i = 0; i < kDots; ++i) out[i] = (sums[i][0] + sums[i][2]) + (sums[i][1] + sums[i][3]);
}
#endif

// values[i] += grad · column i of the first kCount columns named, over `tokens`, a multiple of the lanes.
template <int kCount, typename Real>
PARTUNE_FN void dots(const Real* grad, const Real* input, const int32_t* columns, int64_t tokens,
                     Real* values) {
  const Real* column[kCount];
  Vector<Real> sums[kDots] = {};
  PARTUNE_UNROLL
  for (int i = 0; i < kCount; ++i) column[i] = input + int64_t(columns[i]) * kTokenBlock<Real>;
  for (int64_t token = 0; token < tokens; token += kLanes<Real>) {
    const Vector<Real> g = load_vector(grad + token);
    PARTUNE_UNROLL
    for (int i = 0; i < kCount; ++i) sums[i] = multiply_add(load_vector(column[i] + token), g, sums[i]);
  }
  Real added[kDots];
  sum_lanes(sums, added);
  PARTUNE_UNROLL
  for (int i = 0; i < kCount; ++i) values[i] += added[i];
}

template <int kCount, typename Real>
void some_dots(int64_t count, const Real* grad, const Real* input, const int32_t* columns, int64_t tokens,
               Real* values) {
  if (count == kCount) return dots<kCount>(grad, input, columns, tokens, values);
  if constexpr (kCount > 1) some_dots<kCount - 1>(count, grad, input, columns, tokens, values);
}

// Columns whose packed tokens take half of an L2 cache.
constexpr int64_t kPanelColumns = 512;

template <typename Real>
void product(const SampledGradBlock<Real>& block, int64_t first_row, int64_t last_row, int64_t begin,
             int64_t end, int64_t* cursors) {
  const int64_t* crow = block.csr.crow_indices;
  const int32_t* col = block.csr.col_indices;
  const int64_t tokens = (block.tokens + kLanes<Real> - 1) / kLanes<Real> * kLanes<Real>;
  for (int64_t row = first_row; row < last_row; ++row) cursors[row - first_row] = larger(begin, crow[row]);
  for (int64_t panel = 0; panel < block.columns; panel += kPanelColumns) {
    const int64_t panel_end = panel + kPanelColumns;
    for (int64_t row = first_row; row < last_row; ++row) {
      const Real* grad = block.grad + row * kTokenBlock<Real>;
      const int64_t stop = smaller(end, crow[row + 1]);
      int64_t entry = cursors[row - first_row];
      for (; entry + kDots <= stop && col[entry + kDots - 1] < panel_end; entry += kDots) {
        dots<kDots>(grad, block.input, col + entry, tokens, block.values + entry);
      }
      int64_t count = 0;
      while (entry + count < stop && col[entry + count] < panel_end) ++count;
      some_dots<kDots - 1>(count, grad, block.input, col + entry, tokens, block.values + entry);
      cursors[row - first_row] = entry + count;
    }
  }
}

// ---- panels ----

template <typename Stored, typename Real>
void compact(const void* from, int64_t columns, int64_t first_row, const CsrView& csr, int64_t begin,
             int64_t end, Real* values) {
  const Stored* panel = static_cast<const Stored*>(from);
  for (int64_t row = first_row; row < csr.rows && csr.crow_indices[row] < end; ++row) {
    const Stored* line = panel + (row - first_row) * columns;
    const int64_t stop = smaller(end, csr.crow_indices[row + 1]);
    for (int64_t entry = larger(begin, csr.crow_indices[row]); entry < stop; ++entry) {
      values[entry] += widen(line[csr.col_indices[entry]]);
    }
  }
}

template <typename Stored, typename Real>
constexpr SampledGradBodies<Real> kBodies = {pack<Stored, Real>, product<Real>, compact<Stored, Real>};

}  // namespace

const SampledGradCpu sampled_grad_cpu = {kBodies<double, double>, kBodies<float, float>,
                                         kBodies<BFloat16, float>, kBodies<Half, float>};

}  // namespace PARTUNE_ISA
}  // namespace partune
