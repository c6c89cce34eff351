// One SIMD register of numbers, with the arithmetic that formulas for one number are written in; and how
// stored numbers become lanes, and the lanes of two registers stored numbers.
#pragma once
#include "element_vectors_cpu.h"

namespace partune {

// Integers of a register, as wide as a number of kBytes.
template <int kBytes>
struct BitsOf;
template <>
struct BitsOf<4> {
  typedef uint32_t Type __attribute__((vector_size(kVectorBytes)));
  static constexpr uint32_t kSign = uint32_t{1} << 31;
};
template <>
struct BitsOf<8> {
  typedef uint64_t Type __attribute__((vector_size(kVectorBytes)));
  static constexpr uint64_t kSign = uint64_t{1} << 63;
};

template <typename Real>
struct Lanes {
  using Bits = typename BitsOf<int(sizeof(Real))>::Type;
  Vector<Real> at;

  Lanes() = default;
  PARTUNE_MEMBER explicit Lanes(Vector<Real> values) : at(values) {}
  PARTUNE_MEMBER explicit Lanes(Bits bits) : at((Vector<Real>)bits) {}
  PARTUNE_MEMBER explicit Lanes(Real every) : at(every - Vector<Real>{}) {}  // -0 too

  PARTUNE_MEMBER Bits bits() const { return (Bits)at; }
};

template <typename Real>
struct ScalarOfNumber<Lanes<Real>> {
  using Type = Real;
};

template <typename Real>
PARTUNE_FN Lanes<Real> operator+(Lanes<Real> a, Lanes<Real> b) {
  return Lanes<Real>(a.at + b.at);
}
template <typename Real>
PARTUNE_FN Lanes<Real> operator-(Lanes<Real> a, Lanes<Real> b) {
  return Lanes<Real>(a.at - b.at);
}
template <typename Real>
PARTUNE_FN Lanes<Real> operator-(Lanes<Real> a) {
  return Lanes<Real>(-a.at);
}
template <typename Real>
PARTUNE_FN Lanes<Real> multiply(Lanes<Real> a, Lanes<Real> b) {
  return Lanes<Real>(a.at * b.at);
}
template <typename Real>
PARTUNE_FN Lanes<Real> multiply_add(Lanes<Real> a, Lanes<Real> b, Lanes<Real> c) {
  return Lanes<Real>(multiply_add(a.at, b.at, c.at));
}
template <typename Real>
PARTUNE_FN Lanes<Real> magnitude_up_to(Lanes<Real> x, Real limit) {
  const Vector<Real> size = Lanes<Real>(x.bits() & ~BitsOf<int(sizeof(Real))>::kSign).at;
  const Vector<Real> limits = Lanes<Real>(limit).at;
  return Lanes<Real>(limits < size ? limits : size);
}
template <typename Real>
PARTUNE_FN Lanes<Real> positive_part(Lanes<Real> x) {
  return Lanes<Real>(Vector<Real>{} > x.at ? Vector<Real>{} : x.at);
}
template <typename Real>
PARTUNE_FN Lanes<Real> where_negative(Lanes<Real> x, Lanes<Real> yes, Lanes<Real> no) {
  return Lanes<Real>(x.at < Vector<Real>{} ? yes.at : no.at);
}

// The sum of all lanes, halved until one is left.
template <typename Real>
PARTUNE_FN Real sum_of_lanes(Lanes<Real> lanes) {
  Real sums[kLanes<Real>];
  store_vector(lanes.at, sums);
  for (int half = kLanes<Real> / 2; half >= 1; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

// What gelu.h takes, of bits. In float32 the division has the bits of its quotient.
PARTUNE_FN Lanes<float> scale_by_power(Lanes<float> p, Lanes<float> shifted) {
  return Lanes<float>(p.bits() + (shifted.bits() << 23));
}
PARTUNE_FN Lanes<double> scale_by_power(Lanes<double> p, Lanes<double> shifted) {
  return Lanes<double>(p.bits() + (shifted.bits() << 52));
}
PARTUNE_FN Lanes<float> quotient(Lanes<float> numerator, Lanes<float> d) {
  return Lanes<float>(numerator.at / d.at);
}
PARTUNE_FN Lanes<double> near_reciprocal(Lanes<double> d) {
  return Lanes<double>(uint64_t{0x7fde623822fc16e6} - d.bits());
}

// ---- loading kTwice<Real> numbers ----

template <typename Real>
constexpr int kTwice = 2 * kLanes<Real>;

template <typename Real>
struct TwoLanes {
  Lanes<Real> at[2];
};

template <typename Real>
PARTUNE_FN TwoLanes<Real> load_lanes(const Real* from) {
  return {{Lanes<Real>(load_vector(from)), Lanes<Real>(load_vector(from + kLanes<Real>))}};
}

#if defined(__AVX512F__)
constexpr Lanes<float>::Bits kCount = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

PARTUNE_FN TwoLanes<float> load_lanes(const BFloat16* from) {
  constexpr __mmask32 kUpperWords = 0xaaaaaaaa;  // where the words go
  const __m512i words = _mm512_loadu_si512(from);
  TwoLanes<float> lanes;
  for (int half = 0; half < 2; ++half) {
    const __m512i order = (__m512i)((kCount + uint32_t(half * kLanes<float>)) << 16);
    lanes.at[half] = Lanes<float>((Vector<float>)_mm512_maskz_permutexvar_epi16(kUpperWords, order, words));
  }
  return lanes;
}

#else
PARTUNE_FN TwoLanes<float> load_lanes(const BFloat16* from) {
  return {{Lanes<float>(widen_vector(from)), Lanes<float>(widen_vector(from + kLanes<float>))}};
}
#endif

PARTUNE_FN TwoLanes<float> load_lanes(const Half* from) {
  return {{Lanes<float>(widen_vector(from)), Lanes<float>(widen_vector(from + kLanes<float>))}};
}

// ---- storing as many, rounded to nearest ----

template <typename Real>
PARTUNE_FN void store_lanes(const TwoLanes<Real>& lanes, Real* to) {
  store_vector(lanes.at[0].at, to);
  store_vector(lanes.at[1].at, to + kLanes<Real>);
}

#if defined(__AVX512F__)
// The upper words, and one more where the lower word, or an odd upper one beside a lower of 0x8000, asks
// for it. Only a NaN's upper word is 0x7fff or 0xffff, and stays as it is.
PARTUNE_FN void store_rounded_words(const TwoLanes<float>& lanes, BFloat16* to) {
  const auto words = [&](uint32_t first) __attribute__((always_inline)) {
    const __m512i order = (__m512i)(kCount * 0x00040004u + 0x00020000u + first * 0x00010001u);
    return _mm512_permutex2var_epi16((__m512i)lanes.at[0].at, order, (__m512i)lanes.at[1].at);
  };
  const __m512i upper = words(1), lower = words(0);
  const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi16(1));
  const __m512i half = _mm512_set1_epi16(int16_t(0x8000)), ones = _mm512_set1_epi16(-1);
  const __mmask32 up = _mm512_cmpgt_epu16_mask(_mm512_adds_epu16(lower, odd), half);
  const __mmask32 finite = _mm512_mask_cmpneq_epu16_mask(up, _mm512_or_si512(upper, half), ones);
  _mm512_storeu_si512(to, _mm512_mask_sub_epi16(upper, finite, upper, ones));
}

PARTUNE_FN void store_lanes(const TwoLanes<float>& lanes, BFloat16* to) {
#if defined(__AVX512BF16__)
  const __m512 first = (__m512)lanes.at[0].at, second = (__m512)lanes.at[1].at;
  const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(second, first);
  const bool zeros = _mm512_testn_epi16_mask(rounded, _mm512_set1_epi16(0x7fff)) != 0;
  if (__builtin_expect(!zeros || !has_subnormal(first, second), true)) {
    _mm512_storeu_si512(to, rounded);
    return;
  }
#endif
  store_rounded_words(lanes, to);
}
#else
PARTUNE_FN void store_lanes(const TwoLanes<float>& lanes, BFloat16* to) {
  round_vector(lanes.at[0].at, to);
  round_vector(lanes.at[1].at, to + kLanes<float>);
}
#endif

PARTUNE_FN void store_lanes(const TwoLanes<float>& lanes, Half* to) {
  round_vector(lanes.at[0].at, to);
  round_vector(lanes.at[1].at, to + kLanes<float>);
}

// The first `count` of kTwice numbers, and zeros.
template <typename Real, typename T>
struct Padded {
  T at[kTwice<Real>] = {};

  PARTUNE_MEMBER Padded(const T* from, int count) {
    for (int i = 0; i < count; ++i) at[i] = from[i];
  }
  PARTUNE_MEMBER void copy_to(T* to, int count) const {
    for (int i = 0; i < count; ++i) to[i] = at[i];
  }
};

}  // namespace partune
