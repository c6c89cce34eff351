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

PARTUNE_FN int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- packing: tiles of lanes × lanes, transposed ----

template <typename Real>
using Tile = Vector<Real>[kLanes<Real>];
typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));

#if defined(__AVX512F__)
// Interleaving vector i with vector i + 8, four times over, is the transpose.
PARTUNE_FN void transpose(Tile<float>& tile) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  PARTUNE_UNROLL
  for (int round = 0; round < 4; ++round) {
    Tile<float> next;
    PARTUNE_UNROLL
    for (int64_t i = 0; i < 8; ++i) {
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

// What a factor is packed as: bfloat16 as it is, which halves what entries read; else the sums' type.
template <typename Stored>
struct PackedType {
  typedef float Type;
};
template <>
struct PackedType<double> {
  typedef double Type;
};
template <>
struct PackedType<BFloat16> {
  typedef BFloat16 Type;
};
PARTUNE_FN void pack_element(BFloat16 x, BFloat16& packed) { packed = x; }
template <typename Stored, typename Real>
PARTUNE_FN void pack_element(Stored x, Real& packed) {
  packed = widen(x);
}

template <typename Packed>
constexpr int64_t kBlockTokens = kPackedBytes / int64_t(sizeof(Packed));
// Tokens of a packed column that fill a register.
template <typename Packed>
constexpr int64_t kTokens = kVectorBytes / int64_t(sizeof(Packed));

// A tile of columns that fill a register of sums, and the tokens of a packed register.
template <typename Stored>
PARTUNE_FN void load_tile(const Stored* rows, int64_t stride, Tile<typename PackedType<Stored>::Type>& tile) {
  PARTUNE_UNROLL
  for (int64_t i = 0; i < kTokens<typename PackedType<Stored>::Type>; ++i) {
    tile[i] = widen_lanes(rows + i * stride);
  }
}

// Two tokens to a lane.
PARTUNE_FN void load_tile(const BFloat16* rows, int64_t stride, Tile<float>& tile) {
  PARTUNE_UNROLL
  for (int64_t i = 0; i < kLanes<float>; ++i) {
    const Bits first = (Bits)widen_lanes(rows + 2 * i * stride);
    const Bits second = (Bits)widen_lanes(rows + (2 * i + 1) * stride);
    tile[i] = (Vector<float>)(first >> 16 | second);
  }
}

// `tokens` × `columns` of a tile; zeros beyond.
template <typename Stored, typename Packed>
void pack_edge(const Stored* factor, int64_t stride, int64_t tokens, int64_t columns, Packed* packed) {
  for (int64_t column = 0; column < columns; ++column) {
    for (int64_t token = 0; token < kTokens<Packed>; ++token) {
      Packed element = {};
      if (token < tokens) pack_element(factor[token * stride + column], element);
      packed[column * kBlockTokens<Packed> + token] = element;
    }
  }
}

template <typename Stored, typename Real>
void pack(const void* from, int64_t stride, int64_t tokens, int64_t begin, int64_t end, char* to) {
  using Packed = typename PackedType<Stored>::Type;
  constexpr int64_t kColumns = kLanes<Real>;
  const Stored* factor = static_cast<const Stored*>(from);
  for (int64_t token = 0; token < tokens; token += kTokens<Packed>) {
    const Stored* rows = factor + token * stride;
    for (int64_t column = begin; column < end; column += kColumns) {
      Packed* packed = reinterpret_cast<Packed*>(to) + (column - begin) * kBlockTokens<Packed> + token;
      if (token + kTokens<Packed> > tokens || column + kColumns > end) {
        pack_edge(rows + column, stride, smaller(tokens - token, kTokens<Packed>),
                  smaller(end - column, kColumns), packed);
        continue;
      }
      Tile<Real> tile;
      load_tile(rows + column, stride, tile);
      transpose(tile);
      PARTUNE_UNROLL
      for (int64_t i = 0; i < kColumns; ++i) {
        __builtin_memcpy(packed + i * kBlockTokens<Packed>, &tile[i], sizeof tile[i]);
      }
    }
  }
}

// ---- dot products ----

constexpr int kDots = kVectorBytes == 64 ? 8 : 4;  // so many at once: independent sums hide the latency

// The sums over the lanes of some vectors, each in the same order wherever it stands.
template <int kCount>
PARTUNE_FN void sum_lanes(const Vector<double> (&sums)[kCount], double* out) {
  for (int i = 0; i < kCount; ++i) {
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

template <int kCount>
PARTUNE_FN void sum_lanes(const Vector<float> (&sums)[kCount], float* out) {
  PARTUNE_UNROLL
  for (int i = 0; i < kCount; i += 4) {
    __m128 a = quarter_sum(sums[i]), b = quarter_sum(sums[i + 1]);
    __m128 c = quarter_sum(sums[i + 2]), d = quarter_sum(sums[i + 3]);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    _mm_storeu_ps(out + i, _mm_add_ps(_mm_add_ps(a, c), _mm_add_ps(b, d)));
  }
}
#else
template <int kCount>
PARTUNE_FN void sum_lanes(const Vector<float> (&sums)[kCount], float* out) {
  for (int i = 0; i < kCount; ++i) out[i] = (sums[i][0] + sums[i][2]) + (sums[i][1] + sums[i][3]);
}
#endif

// Neighbouring tokens of a packed column, as many as fill a register.
struct Pairs {
  Vector<float> first, second;
};
PARTUNE_FN Vector<double> load_operand(const double* from) { return load_vector(from); }
PARTUNE_FN Vector<float> load_operand(const float* from) { return load_vector(from); }
PARTUNE_FN Pairs load_operand(const BFloat16* from) {
  Bits bits;
  __builtin_memcpy(&bits, from, sizeof bits);
  return {(Vector<float>)(bits << 16), (Vector<float>)(bits & 0xffff0000u)};
}

template <typename Lanes>
PARTUNE_FN Lanes add_product(Lanes a, Lanes b, Lanes sum) {
  return multiply_add(a, b, sum);
}
PARTUNE_FN Vector<float> add_product(const Pairs& a, const Pairs& b, Vector<float> sum) {
  return multiply_add(a.second, b.second, multiply_add(a.first, b.first, sum));
}

// values[i] += grad · column i of the first kCount columns named, over `tokens`, a multiple of kTokens.
template <int kCount, typename Packed, typename Real>
PARTUNE_FN void dots(const Packed* grad, const Packed* input, const int32_t* columns, int64_t tokens,
                     Real* values) {
  const Packed* column[kCount];
  Vector<Real> sums[kDots] = {};
  PARTUNE_UNROLL
  for (int i = 0; i < kCount; ++i) column[i] = input + int64_t(columns[i]) * kBlockTokens<Packed>;
  for (int64_t token = 0; token < tokens; token += kTokens<Packed>) {
    const auto g = load_operand(grad + token);
    PARTUNE_UNROLL
    for (int i = 0; i < kCount; ++i) sums[i] = add_product(load_operand(column[i] + token), g, sums[i]);
  }
  Real added[kDots];
  sum_lanes(sums, added);
  PARTUNE_UNROLL
  for (int i = 0; i < kCount; ++i) values[i] += added[i];
}

template <int kCount, typename Packed, typename Real>
void some_dots(int64_t count, const Packed* grad, const Packed* input, const int32_t* columns, int64_t tokens,
               Real* values) {
  if (count == kCount) return dots<kCount>(grad, input, columns, tokens, values);
  if constexpr (kCount > 1) some_dots<kCount - 1>(count, grad, input, columns, tokens, values);
}

// Rows of a block at once: with the operands, as many sums as there are registers for.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = kBlockSide;
#else
constexpr int kTileRows = kBlockSide / 2;
#endif

// A block of values, whose rows lie row_entries apart, += its rows of grad · its columns of input, each entry
// summed as `dots` does. Of four columns from `next` on, each time a line is asked for (measured: a twentieth
// of the time; where a register is less than a line it doesn't pay).
template <typename Packed, typename Real>
PARTUNE_FN void block_dots(const Packed* grad, const Packed* input, const Packed* next, int64_t tokens,
                           int64_t row_entries, Real* values) {
  using Operand = decltype(load_operand(grad));
  for (int first = 0; first < kBlockSide; first += kTileRows) {
    const Packed* rows = grad + first * kBlockTokens<Packed>;
    Vector<Real> sums[kTileRows * kBlockSide] = {};
    for (int64_t token = 0; token < tokens; token += kTokens<Packed>) {
      Operand g[kTileRows];
      PARTUNE_UNROLL
      for (int i = 0; i < kTileRows; ++i) g[i] = load_operand(rows + i * kBlockTokens<Packed> + token);
      PARTUNE_UNROLL
      for (int j = 0; j < kBlockSide; ++j) {
        const Operand x = load_operand(input + j * kBlockTokens<Packed> + token);
        if constexpr (kVectorBytes == 64) __builtin_prefetch(next + j * kBlockTokens<Packed> + token);
        PARTUNE_UNROLL
        for (int i = 0; i < kTileRows; ++i) {
          sums[i * kBlockSide + j] = add_product(x, g[i], sums[i * kBlockSide + j]);
        }
      }
    }
    Real added[kTileRows * kBlockSide];
    sum_lanes(sums, added);
    PARTUNE_UNROLL
    for (int i = 0; i < kTileRows; ++i) {
      Real* row = values + (first + i) * row_entries;
      PARTUNE_UNROLL
      for (int j = 0; j < kBlockSide; ++j) row[j] += added[i * kBlockSide + j];
    }
  }
}

// Entries of a row in a panel lie far from the next row's, where prefetchers don't look, and their columns
// say what is read: asked for some rows ahead, as many as 5 % and a line to spare (measured at 4096 by 4096:
// a third of the time).
constexpr int64_t kRowsAhead = 2, kEntriesAhead = 48;

// The entries of a row from `entry` on that lie before last_column; where they end.
template <typename Packed, typename Real>
PARTUNE_FN int64_t row_product(const Packed* grad, const Packed* input, const SampledGradPanel<Real>& panel,
                               int64_t tokens, int64_t entry, int64_t stop) {
  const int32_t* col = panel.csr.col_indices;
  for (; entry + kDots <= stop && col[entry + kDots - 1] < panel.last_column; entry += kDots) {
    dots<kDots>(grad, input, col + entry, tokens, panel.values + entry);
  }
  int64_t count = 0;
  while (entry + count < stop && col[entry + count] < panel.last_column) ++count;
  some_dots<kDots - 1>(count, grad, input, col + entry, tokens, panel.values + entry);
  return entry + count;
}

// The same of a block row, by its first row; the others' entries lie row_entries behind each other.
template <typename Packed, typename Real>
PARTUNE_FN int64_t block_row_product(const Packed* grad, const Packed* input,
                                     const SampledGradPanel<Real>& panel, int64_t tokens, int64_t row_entries,
                                     int64_t entry, int64_t stop) {
  const int32_t* col = panel.csr.col_indices;
  const auto has_block = [&](int64_t at) { return at + kBlockSide <= stop && col[at] < panel.last_column; };
  const auto columns = [&](int64_t at) {
    return input + col[at] / kBlockSide * kBlockSide * kBlockTokens<Packed>;
  };
  while (has_block(entry)) {
    const int64_t next = entry + kBlockSide;
    const Packed* then = has_block(next) ? columns(next) : grad + kBlockSide * kBlockTokens<Packed>;
    block_dots(grad, columns(entry), then, tokens, row_entries, panel.values + entry);
    entry = next;
  }
  return entry;
}

template <int kSide, typename Packed, typename Real>
void product(const SampledGradPanel<Real>& panel, int64_t first_row, int64_t last_row, int64_t end,
             int64_t* cursors) {
  const int64_t* crow = panel.csr.crow_indices;
  const int32_t* col = panel.csr.col_indices;
  const Packed* grad = reinterpret_cast<const Packed*>(panel.grad);
  const Packed* input =
      reinterpret_cast<const Packed*>(panel.input) - panel.first_column * kBlockTokens<Packed>;
  const int64_t tokens = (panel.tokens + kTokens<Packed> - 1) / kTokens<Packed> * kTokens<Packed>;
  // What is packed next comes from memory, while products wait for the L2 cache (measured: where factors
  // aren't in caches, a tenth of the time).
  ReadAhead grads = panel.ahead[0], inputs = panel.ahead[1];
  grads.spread((last_row - first_row) / kSide);
  inputs.spread((last_row - first_row) / kSide);
  for (int64_t row = first_row; row < last_row; row += kSide, grad += kSide * kBlockTokens<Packed>) {
    int64_t* cursor = cursors + (row - first_row) / kSide;
    grads.ask();
    inputs.ask();
    if (const int64_t ahead = row + kRowsAhead * kSide; ahead < last_row) {
      const int64_t next = cursor[kRowsAhead], next_entries = (crow[ahead + kSide] - crow[ahead]) / kSide;
      PARTUNE_UNROLL
      for (int64_t i = 0; i < kEntriesAhead; i += 16) {
        __builtin_prefetch(col + next + i);
        for (int j = 0; j < kSide; ++j) __builtin_prefetch(panel.values + next + j * next_entries + i);
      }
    }
    const int64_t begin = crow[row], row_entries = (crow[row + kSide] - begin) / kSide;
    const int64_t stop = begin + (smaller(end, crow[row + kSide]) - begin) / kSide;
    if constexpr (kSide == 1) {
      *cursor = row_product(grad, input, panel, tokens, *cursor, stop);
    } else {
      *cursor = block_row_product(grad, input, panel, tokens, row_entries, *cursor, stop);
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
constexpr SampledGradBodies<Real> kBodies = {
    kBlockTokens<typename PackedType<Stored>::Type>, pack<Stored, Real>,
    product<1, typename PackedType<Stored>::Type, Real>,
    product<kBlockSide, typename PackedType<Stored>::Type, Real>, compact<Stored, Real>};

}  // namespace

const SampledGradCpu sampled_grad_cpu = {kBodies<double, double>, kBodies<float, float>,
                                         kBodies<BFloat16, float>, kBodies<Half, float>};

}  // namespace PARTUNE_ISA
}  // namespace partune
