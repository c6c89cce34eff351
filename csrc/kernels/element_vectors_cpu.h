// Stored elements as vectors of the computing type, and back; and what factors such vectors are multiplied
// by.
#pragma once
#include "vector.h"

namespace partune {

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

#if defined(__AVX512BF16__)
// What the machine's own rounding to bfloat16 makes zeros of.
PARTUNE_FN bool has_subnormal(__m512 a, __m512 b) {
  constexpr int kSubnormal = 0x20;
  return (_mm512_fpclass_ps_mask(a, kSubnormal) | _mm512_fpclass_ps_mask(b, kSubnormal)) != 0;
}
#endif

PARTUNE_FN void round_vector(Vector<float> v, BFloat16* to) {
#if defined(__AVX512BF16__)
  if (__builtin_expect(!has_subnormal((__m512)v, (__m512)v), true)) {
    const __m256bh quick = _mm512_cvtneps_pbh((__m512)v);
    __builtin_memcpy(to, &quick, sizeof quick);
    return;
  }
#endif
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

// How a factor is multiplied with a row of ranks: one number with another.
template <typename Real>
struct Singles {
  PARTUNE_MEMBER static Vector<Real> spread(const Real* factor) { return repeat(*factor); }
  PARTUNE_MEMBER static Vector<Real> add(Vector<Real> factor, Vector<Real> row, Vector<Real> sum) {
    return multiply_add(factor, row, sum);
  }
};

#if defined(__AVX512BF16__)
// Two of bfloat16 in the place of a float, from two ranks, with two others.
struct Pairs {
  PARTUNE_MEMBER static Vector<float> spread(const float* factor) {
    int32_t bits;
    __builtin_memcpy(&bits, factor, sizeof bits);
    return (Vector<float>)_mm512_set1_epi32(bits);
  }
  PARTUNE_MEMBER static Vector<float> add(Vector<float> factor, Vector<float> row, Vector<float> sum) {
    return (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)factor, (__m512bh)row);
  }

  // Of numbers side by side.
  PARTUNE_MEMBER static void of_neighbours(const float* from, int64_t count, float* pairs) {
    for (int64_t i = 0; i < count; i += kLanes<float>) {
      const __m256bh rounded = _mm512_cvtneps_pbh((__m512)widen_first<float>(from + i, count - i));
      __builtin_memcpy(pairs + i / 2, &rounded, sizeof rounded);
    }
  }

  // Of numbers below each other, in columns.
  PARTUNE_MEMBER static void of_rows(const float* upper, const float* lower, int64_t columns, float* pairs) {
    for (int64_t i = 0; i < columns; i += kLanes<float>) {
      const int64_t count = columns - i;
      const auto words = [&](const float* row) __attribute__((always_inline)) {
        const __m512 wide = row ? (__m512)widen_first<float>(row + i, count) : _mm512_setzero_ps();
        return (FloatBits)_mm512_maskz_cvtepu16_epi32(__mmask16(0xffff), (__m256i)_mm512_cvtneps_pbh(wide));
      };
      round_first<float>((Vector<float>)(words(upper) | words(lower) << 16), pairs + i, count);
    }
  }
};
#endif

}  // namespace partune
