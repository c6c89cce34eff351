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

// out[i] += the sum of v[i]'s lanes.
template <int kCount, typename Real>
PARTUNE_FN void add_lane_sums(const Vector<Real> (&v)[kCount], Real* out) {
  for (int i = 0; i < kCount; ++i) out[i] += sum_of_lanes(Lanes<Real>(v[i]));
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

template <int kTokens, int kVectors, typename Stored, typename Real, typename Products>
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
      Vector<Real> factor = Products::spread(factors.row(i) + rank);
      keep_in_register<Real>(factor);
      PARTUNE_UNROLL
      for (int k = 0; k < kVectors; ++k) sums[i][k] = Products::add(factor, read[k], sums[i][k]);
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

template <typename Stored, typename Real, typename Products>
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
      expand_block<kTokens, kExpandVectors, Stored, Real, Products>(
          left, {thin.at + column, thin.stride}, ranks, kStep, out.from(token, column), ahead);
    }
    for (; column < columns; column += kStep) {
      const int64_t rest = columns - column;
      expand_block<kTokens, 1, Stored, Real, Products>(left, {thin.at + column, thin.stride}, ranks,
                                                       rest < kStep ? rest : kStep, out.from(token, column),
                                                       ahead);
    }
  }
};

template <typename Stored, typename Real, typename Products = Singles<Real>>
static void expand(Rows<const Real> factors, int64_t tokens, Rows<const Real> thin, int64_t ranks,
                   int64_t columns, const Chunks<Stored>& out, ReadAhead& ahead) {
  in_runs<kExpandTokens>(tokens,
                         ExpandTokens<Stored, Real, Products>{factors, thin, ranks, columns, out, ahead});
}
template <typename Real>
PARTUNE_FN int64_t expand_steps(int64_t tokens, int64_t ranks, int64_t columns) {
  return quotient_up(tokens, kExpandTokens) * ranks * quotient_up(columns, kExpandVectors * kLanes<Real>);
}

}  // namespace partune
