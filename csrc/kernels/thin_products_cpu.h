// Products with a thin matrix [ranks, columns] on the CPU, lanes along the columns. What a row of ranks is
// multiplied by stays in registers, as blocks of tokens times ranks or columns.
#pragma once
#include "lanes.h"
#include "read_ahead.h"

namespace partune {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRankBlock = 8;     // ranks whose sums are kept in registers
constexpr int kExpandTokens = 6;  // tokens of a block of `expand`
constexpr int kExpandVectors = 4;
#else
constexpr int kRankBlock = 4;
constexpr int kExpandTokens = 3;
constexpr int kExpandVectors = 3;
#endif
constexpr int kProjectTokens = 3;
constexpr int kAccumulateVectors = 3;

// ---- elements as vectors of the computing type ----

PARTUNE_FN Vector<float> widen_vector(const float* from) { return load_vector(from); }
PARTUNE_FN Vector<double> widen_vector(const double* from) { return load_vector(from); }

typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t FloatBits __attribute__((vector_size(kVectorBytes)));

// gcc makes five instructions of a conversion to a whole register of AVX-512.
PARTUNE_FN Vector<float> widen_vector(const BFloat16* from) {
#if defined(__AVX512F__)
  const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return (Vector<float>)((FloatBits)_mm512_maskz_cvtepu16_epi32(__mmask16(0xffff), narrow) << 16);
#else
  Halves bits;
  __builtin_memcpy(&bits, from, sizeof bits);
  return (Vector<float>)(__builtin_convertvector(bits, FloatBits) << 16);
#endif
}

PARTUNE_FN Vector<float> widen_vector(const Half* from) {
#if defined(__AVX512F__)
  return (Vector<float>)_mm512_maskz_cvtph_ps(0xffff,
                                              _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__)
  return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  Vector<float> wide;
  for (int i = 0; i < kLanes<float>; ++i) wide[i] = widen(from[i]);
  return wide;
#endif
}

PARTUNE_FN void round_vector(Vector<float> v, float* to) { store_vector(v, to); }
PARTUNE_FN void round_vector(Vector<double> v, double* to) { store_vector(v, to); }

PARTUNE_FN void round_vector(Vector<float> v, BFloat16* to) {
  const FloatBits bits = (FloatBits)v;
  FloatBits rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
#if defined(__AVX512F__)
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  rounded =
      (FloatBits)_mm512_mask_or_epi32((__m512i)rounded, nan, (__m512i)bits, _mm512_set1_epi32(0x400000));
#else
  const FloatBits nan = (FloatBits)(v != v);
  rounded = (nan & (bits | 0x400000u)) | (~nan & rounded);
#endif
  const Halves out = __builtin_convertvector(rounded >> 16, Halves);
  __builtin_memcpy(to, &out, sizeof out);
}

PARTUNE_FN void round_vector(Vector<float> v, Half* to) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes<float>; ++i) round_nearest(v[i], to[i]);
#endif
}

template <typename Real>
PARTUNE_FN Vector<Real> repeat(Real value) {
  return value - Vector<Real>{};  // exact, so the compiler leaves the broadcast alone
}

// Keeps the compiler from reading a vector from memory again for each use of it.
template <typename Real>
PARTUNE_FN void keep_in_register(Vector<Real>& v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
}

// The first `count` elements, zeros behind them; and the store of as many.
template <typename Real, typename Stored>
PARTUNE_FN Vector<Real> widen_first(const Stored* from, int64_t count) {
  if (count >= kLanes<Real>) return widen_vector(from);
  Stored padded[kLanes<Real>] = {};
  __builtin_memcpy(padded, from, uint64_t(count) * sizeof(Stored));
  return widen_vector(padded);
}

template <typename Real, typename Stored>
PARTUNE_FN void round_first(Vector<Real> v, Stored* to, int64_t count) {
  if (count >= kLanes<Real>) {
    round_vector(v, to);
    return;
  }
  Stored padded[kLanes<Real>];
  round_vector(v, padded);
  __builtin_memcpy(to, padded, uint64_t(count) * sizeof(Stored));
}

template <typename Real>
PARTUNE_FN Real sum_lanes(Vector<Real> v) {
  Real lanes[kLanes<Real>];
  store_vector(v, lanes);
  for (int half = kLanes<Real> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// out[i] += the sum of v[i]'s lanes.
template <int kCount, typename Real>
PARTUNE_FN void add_lane_sums(const Vector<Real> (&v)[kCount], Real* out) {
  for (int i = 0; i < kCount; ++i) out[i] += sum_lanes<Real>(v[i]);
}

#if defined(__AVX512F__)
PARTUNE_FN __m256 fold(Vector<float> v) {
  const __m512 all = (__m512)v;
  return _mm256_add_ps(_mm512_maskz_extractf32x8_ps(0xff, all, 0),
                       _mm512_maskz_extractf32x8_ps(0xff, all, 1));
}
PARTUNE_FN void add_lane_sums(const Vector<float> (&v)[8], float* out) {
  const __m256 a =
      _mm256_hadd_ps(_mm256_hadd_ps(fold(v[0]), fold(v[1])), _mm256_hadd_ps(fold(v[2]), fold(v[3])));
  const __m256 b =
      _mm256_hadd_ps(_mm256_hadd_ps(fold(v[4]), fold(v[5])), _mm256_hadd_ps(fold(v[6]), fold(v[7])));
  const __m256 sums = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  _mm256_storeu_ps(out, _mm256_add_ps(_mm256_loadu_ps(out), sums));
}
#endif

// A matrix whose rows lie `stride` elements apart.
template <typename T>
struct Rows {
  T* at;
  int64_t stride;
  PARTUNE_MEMBER T* row(int64_t i) const { return at + i * stride; }
};

PARTUNE_FN int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls body.run<n>(begin) for runs of kMost, and then of fewer, until [0, count) is done.
template <int kMost, typename Body>
PARTUNE_FN void in_runs(int64_t count, const Body& body, int64_t begin = 0) {
  for (; begin + kMost <= count; begin += kMost) body.template run<kMost>(begin);
  if constexpr (kMost > 1) in_runs<(kMost > 3 ? kMost / 2 : kMost - 1)>(count, body, begin);
}

// ---- products[token][rank] += Σ x[token][column]·thin[rank][column] ----

template <int kTokens, int kRanks, typename Stored, typename Real>
PARTUNE_FN void project_block(Rows<const Stored> x, Rows<const Real> thin, int64_t columns,
                              Rows<Real> products, ReadAhead& ahead) {
  constexpr int64_t kStep = kLanes<Real>;
  Vector<Real> sums[kTokens][kRanks] = {};
  const auto add = [&](int64_t column, int64_t count) __attribute__((always_inline)) {
    Vector<Real> read[kTokens];
    PARTUNE_UNROLL
    for (int i = 0; i < kTokens; ++i) read[i] = widen_first<Real>(x.row(i) + column, count);
    PARTUNE_UNROLL
    for (int j = 0; j < kRanks; ++j) {
      Vector<Real> factor = widen_first<Real>(thin.row(j) + column, count);
      keep_in_register<Real>(factor);
      PARTUNE_UNROLL
      for (int i = 0; i < kTokens; ++i) sums[i][j] = multiply_add(read[i], factor, sums[i][j]);
    }
  };
  int64_t column = 0;
  for (; column + kStep <= columns; column += kStep) {
    ahead.ask();
    add(column, kStep);
  }
  if (column < columns) add(column, columns - column);
  PARTUNE_UNROLL
  for (int i = 0; i < kTokens; ++i) add_lane_sums(sums[i], products.row(i));
}

template <int kRanks, typename Stored, typename Real>
struct ProjectTokens {
  Rows<const Stored> x;
  Rows<const Real> thin;
  int64_t columns;
  Rows<Real> products;
  ReadAhead& ahead;
  template <int kTokens>
  PARTUNE_MEMBER void run(int64_t token) const {
    project_block<kTokens, kRanks, Stored, Real>({x.row(token), x.stride}, thin, columns,
                                                 {products.row(token), products.stride}, ahead);
  }
};

template <typename Stored, typename Real>
struct ProjectRanks {
  Rows<const Stored> x;
  Rows<const Real> thin;
  int64_t columns;
  Rows<Real> products;
  int64_t tokens;
  ReadAhead& ahead;
  template <int kRanks>
  PARTUNE_MEMBER void run(int64_t rank) const {
    const ProjectTokens<kRanks, Stored, Real> body{
        x, {thin.row(rank), thin.stride}, columns, {products.at + rank, products.stride}, ahead};
    in_runs<kProjectTokens>(tokens, body);
  }
};

template <typename Stored, typename Real>
static void project(Rows<const Stored> x, int64_t tokens, Rows<const Real> thin, int64_t ranks,
                    int64_t columns, Rows<Real> products, ReadAhead& ahead) {
  in_runs<kRankBlock>(ranks, ProjectRanks<Stored, Real>{x, thin, columns, products, tokens, ahead});
}
template <typename Real>
PARTUNE_FN int64_t project_steps(int64_t tokens, int64_t ranks, int64_t columns) {
  return quotient_up(tokens, kProjectTokens) * quotient_up(ranks, kRankBlock) * (columns / kLanes<Real>);
}

// ---- sums[rank][column] += Σ factors[token][rank]·x[token][column] ----

template <int kRanks, int kVectors, typename Stored, typename Real>
PARTUNE_FN void accumulate_block(Rows<const Real> factors, Rows<const Stored> x, int64_t tokens, int64_t last,
                                 Rows<Real> sums, ReadAhead& ahead) {
  constexpr int64_t kStep = kLanes<Real>;
  // Of the last vector `last` elements exist.
  const auto count = [&](int k) __attribute__((always_inline)) { return k + 1 < kVectors ? kStep : last; };
  Vector<Real> kept[kRanks][kVectors];
  PARTUNE_UNROLL
  for (int j = 0; j < kRanks; ++j) {
    PARTUNE_UNROLL
    for (int k = 0; k < kVectors; ++k) kept[j][k] = widen_first<Real>(sums.row(j) + k * kStep, count(k));
  }
  for (int64_t token = 0; token < tokens; ++token) {
    ahead.ask();
    Vector<Real> read[kVectors];
    PARTUNE_UNROLL
    for (int k = 0; k < kVectors; ++k) read[k] = widen_first<Real>(x.row(token) + k * kStep, count(k));
    PARTUNE_UNROLL
    for (int j = 0; j < kRanks; ++j) {
      Vector<Real> factor = repeat(factors.row(token)[j]);
      keep_in_register<Real>(factor);
      PARTUNE_UNROLL
      for (int k = 0; k < kVectors; ++k) kept[j][k] = multiply_add(factor, read[k], kept[j][k]);
    }
  }
  PARTUNE_UNROLL
  for (int j = 0; j < kRanks; ++j) {
    PARTUNE_UNROLL
    for (int k = 0; k < kVectors; ++k) round_first<Real>(kept[j][k], sums.row(j) + k * kStep, count(k));
  }
}

template <typename Stored, typename Real>
struct AccumulateRanks {
  Rows<const Real> factors;
  Rows<const Stored> x;
  int64_t tokens, columns;
  Rows<Real> sums;
  ReadAhead& ahead;
  template <int kRanks>
  PARTUNE_MEMBER void run(int64_t rank) const {
    constexpr int64_t kStep = kLanes<Real>;
    const Rows<const Real> left{factors.at + rank, factors.stride};
    int64_t column = 0;
    for (; column + kAccumulateVectors * kStep <= columns; column += kAccumulateVectors * kStep) {
      accumulate_block<kRanks, kAccumulateVectors, Stored, Real>(
          left, {x.at + column, x.stride}, tokens, kStep, {sums.row(rank) + column, sums.stride}, ahead);
    }
    for (; column < columns; column += kStep) {
      const int64_t rest = columns - column;
      accumulate_block<kRanks, 1, Stored, Real>(left, {x.at + column, x.stride}, tokens,
                                                rest < kStep ? rest : kStep,
                                                {sums.row(rank) + column, sums.stride}, ahead);
    }
  }
};

template <typename Stored, typename Real>
static void accumulate(Rows<const Real> factors, Rows<const Stored> x, int64_t tokens, int64_t ranks,
                       int64_t columns, Rows<Real> sums, ReadAhead& ahead) {
  in_runs<kRankBlock>(ranks, AccumulateRanks<Stored, Real>{factors, x, tokens, columns, sums, ahead});
}
template <typename Real>
PARTUNE_FN int64_t accumulate_steps(int64_t tokens, int64_t ranks, int64_t columns) {
  return tokens * quotient_up(ranks, kRankBlock) * quotient_up(columns, kAccumulateVectors * kLanes<Real>);
}

// ---- chunk[token][column] = (add ? chunk : 0) + Σ factors[token][rank]·thin[rank][column] ----

// Chunks of a row, which all get the same, lie `step` elements apart.
template <typename Stored>
struct Chunks {
  Rows<Stored> first;
  int64_t count, step;
  bool add;
  PARTUNE_MEMBER Chunks from(int64_t row, int64_t column) const {
    return {{first.row(row) + column, first.stride}, count, step, add};
  }
};

// to = (add ? to : 0) + values; of the last vector `last` elements exist, all of it where vectors are even in
// number.
template <int kVectors, typename Stored, typename Real>
PARTUNE_FN void write_row(const Vector<Real> (&values)[kVectors], bool add, int64_t last, Stored* to) {
  constexpr int64_t kStep = kLanes<Real>;
  if constexpr (kVectors % 2 == 0) {
    PARTUNE_UNROLL
    for (int k = 0; k < kVectors; k += 2) {
      TwoLanes<Real> both = {{Lanes<Real>(values[k]), Lanes<Real>(values[k + 1])}};
      if (add) {
        const TwoLanes<Real> before = load_lanes(to + k * kStep);
        both = {{both.at[0] + before.at[0], both.at[1] + before.at[1]}};
      }
      store_lanes(both, to + k * kStep);
    }
  } else {
    PARTUNE_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      const int64_t count = k + 1 < kVectors ? kStep : last;
      Vector<Real> value = values[k];
      if (add) value = value + widen_first<Real>(to + k * kStep, count);
      round_first<Real>(value, to + k * kStep, count);
    }
  }
}

template <int kTokens, int kVectors, typename Stored, typename Real>
PARTUNE_FN void expand_block(Rows<const Real> factors, Rows<const Real> thin, int64_t ranks, int64_t last,
                             const Chunks<Stored>& out, ReadAhead& ahead) {
  constexpr int64_t kStep = kLanes<Real>;
  const auto count = [&](int k) __attribute__((always_inline)) { return k + 1 < kVectors ? kStep : last; };
  Vector<Real> sums[kTokens][kVectors] = {};
  for (int64_t rank = 0; rank < ranks; ++rank) {
    ahead.ask();
    Vector<Real> read[kVectors];
    PARTUNE_UNROLL
    for (int k = 0; k < kVectors; ++k) read[k] = widen_first<Real>(thin.row(rank) + k * kStep, count(k));
    PARTUNE_UNROLL
    for (int i = 0; i < kTokens; ++i) {
      Vector<Real> factor = repeat(factors.row(i)[rank]);
      keep_in_register<Real>(factor);
      PARTUNE_UNROLL
      for (int k = 0; k < kVectors; ++k) sums[i][k] = multiply_add(factor, read[k], sums[i][k]);
    }
  }
  for (int64_t chunk = 0; chunk < out.count; ++chunk) {
    PARTUNE_UNROLL
    for (int i = 0; i < kTokens; ++i) {
      Stored* to = out.first.row(i) + chunk * out.step;
      write_row<kVectors, Stored, Real>(sums[i], out.add, last, to);
    }
  }
}

template <typename Stored, typename Real>
struct ExpandTokens {
  Rows<const Real> factors, thin;
  int64_t ranks, columns;
  Chunks<Stored> out;
  ReadAhead& ahead;
  template <int kTokens>
  PARTUNE_MEMBER void run(int64_t token) const {
    constexpr int64_t kStep = kLanes<Real>;
    const Rows<const Real> left{factors.row(token), factors.stride};
    int64_t column = 0;
    for (; column + kExpandVectors * kStep <= columns; column += kExpandVectors * kStep) {
      expand_block<kTokens, kExpandVectors>(left, {thin.at + column, thin.stride}, ranks, kStep,
                                            out.from(token, column), ahead);
    }
    for (; column < columns; column += kStep) {
      const int64_t rest = columns - column;
      expand_block<kTokens, 1>(left, {thin.at + column, thin.stride}, ranks, rest < kStep ? rest : kStep,
                               out.from(token, column), ahead);
    }
  }
};

template <typename Stored, typename Real>
static void expand(Rows<const Real> factors, int64_t tokens, Rows<const Real> thin, int64_t ranks,
                   int64_t columns, const Chunks<Stored>& out, ReadAhead& ahead) {
  in_runs<kExpandTokens>(tokens, ExpandTokens<Stored, Real>{factors, thin, ranks, columns, out, ahead});
}
template <typename Real>
PARTUNE_FN int64_t expand_steps(int64_t tokens, int64_t ranks, int64_t columns) {
  return quotient_up(tokens, kExpandTokens) * ranks * quotient_up(columns, kExpandVectors * kLanes<Real>);
}

}  // namespace partune
