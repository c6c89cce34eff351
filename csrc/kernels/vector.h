// One SIMD register of the instruction set that the including file is built for.
#pragma once
#include "platform.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace partune {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename Real>
struct VectorType;
template <>
struct VectorType<float> {
  typedef float Type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorType<double> {
  typedef double Type __attribute__((vector_size(kVectorBytes)));
};
template <typename Real>
using Vector = typename VectorType<Real>::Type;
template <typename Real>
constexpr int kLanes = kVectorBytes / int(sizeof(Real));

// 64-bit words. Shifts, sums and bitwise operators are the compiler's own.
typedef uint64_t Words __attribute__((vector_size(kVectorBytes)));
constexpr int kWords = kVectorBytes / int(sizeof(uint64_t));

// The product of the low halves of two words; the high halves are ignored.
PARTUNE_FN Words multiply_low_halves(Words a, Words b) {
#if defined(__AVX512F__)
  return (Words)_mm512_maskz_mul_epu32(__mmask8(0xff), (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Words)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// a·b + c in every lane, with the rounding of the scalar multiply_add.
#if defined(__AVX512F__)
PARTUNE_FN Vector<float> multiply_add(Vector<float> a, Vector<float> b, Vector<float> c) {
  return (Vector<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
PARTUNE_FN Vector<double> multiply_add(Vector<double> a, Vector<double> b, Vector<double> c) {
  return (Vector<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
#elif defined(__AVX2__)
PARTUNE_FN Vector<float> multiply_add(Vector<float> a, Vector<float> b, Vector<float> c) {
  return (Vector<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
PARTUNE_FN Vector<double> multiply_add(Vector<double> a, Vector<double> b, Vector<double> c) {
  return (Vector<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
#elif defined(__aarch64__)
PARTUNE_FN Vector<float> multiply_add(Vector<float> a, Vector<float> b, Vector<float> c) {
  return (Vector<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
PARTUNE_FN Vector<double> multiply_add(Vector<double> a, Vector<double> b, Vector<double> c) {
  return (Vector<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
#else
PARTUNE_FN Vector<float> multiply_add(Vector<float> a, Vector<float> b, Vector<float> c) { return a * b + c; }
PARTUNE_FN Vector<double> multiply_add(Vector<double> a, Vector<double> b, Vector<double> c) {
  return a * b + c;
}
#endif

template <typename Real>
PARTUNE_FN Vector<Real> load_vector(const Real* from) {
  Vector<Real> v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <typename Real>
PARTUNE_FN void store_vector(Vector<Real> v, Real* to) {
  __builtin_memcpy(to, &v, sizeof v);
}

PARTUNE_FN Words load_words(const uint64_t* from) {
  Words v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

// out[i] = source[offsets[i]] for kGathered lanes. Zen 4 keeps more misses under way in one gather
// than in as many loads (measured: a fifth off a step's time).
constexpr int kGathered = 8;
#if defined(__AVX512F__)
constexpr __mmask8 kAllGathered = 0xff;  // of the unmasked ones gcc 12 says that they read what isn't set
PARTUNE_FN void gather_lanes(const double* source, const int64_t* offsets, double* out) {
  _mm512_storeu_pd(out, _mm512_mask_i64gather_pd(_mm512_setzero_pd(), kAllGathered,
                                                 _mm512_loadu_si512(offsets), source, 8));
}
PARTUNE_FN void gather_lanes(const float* source, const int64_t* offsets, float* out) {
  _mm256_storeu_ps(out, _mm512_mask_i64gather_ps(_mm256_setzero_ps(), kAllGathered,
                                                 _mm512_loadu_si512(offsets), source, 4));
}
// Of 16 bits: from the aligned words that hold them, which never reach into another page.
PARTUNE_FN void gather_halves(const void* source, const int64_t* offsets, void* out) {
  const __m512i address =
      _mm512_add_epi64(_mm512_maskz_slli_epi64(kAllGathered, _mm512_loadu_si512(offsets), 1),
                       _mm512_set1_epi64(int64_t(source)));
  const __m256i words = _mm512_mask_i64gather_epi32(
      _mm256_setzero_si256(), kAllGathered, _mm512_and_si512(address, _mm512_set1_epi64(-4)), nullptr, 1);
  const __m256i bits = _mm512_maskz_cvtepi64_epi32(
      kAllGathered,
      _mm512_maskz_slli_epi64(kAllGathered, _mm512_and_si512(address, _mm512_set1_epi64(2)), 3));
  _mm_storeu_si128(static_cast<__m128i*>(out), _mm256_cvtepi32_epi16(_mm256_srlv_epi32(words, bits)));
}
PARTUNE_FN void gather_lanes(const BFloat16* source, const int64_t* offsets, BFloat16* out) {
  gather_halves(source, offsets, out);
}
PARTUNE_FN void gather_lanes(const Half* source, const int64_t* offsets, Half* out) {
  gather_halves(source, offsets, out);
}
#else
template <typename Stored>
PARTUNE_FN void gather_lanes(const Stored* source, const int64_t* offsets, Stored* out) {
  for (int i = 0; i < kGathered; ++i) out[i] = source[offsets[i]];
}
#endif

}  // namespace partune
