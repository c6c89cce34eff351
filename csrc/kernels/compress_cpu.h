// Moving the entries whose bit is set together, and back. A bit stands for an entry: bit i mod 32 of
// word i / 32. Elements are moved as they are stored, never converted.
#pragma once
#include "vector.h"

#ifndef PARTUNE_ISA
#error "PARTUNE_ISA names the namespace, and so the instruction set, that this file is built for"
#endif

namespace partune {
namespace PARTUNE_ISA {
namespace {  // NOLINT(misc-anonymous-namespace-in-header): each ISA has its own

// What may be written beyond the last entry of compress()'s output, and read beyond expand()'s input.
constexpr int kCompressSlack = 16;

#if defined(__AVX2__) && !defined(__AVX512F__)
// By eight bits: which lanes they take together, and which lane each takes back, a byte each.
struct LaneTable {
  uint64_t together[256], back[256];
  constexpr LaneTable() : together(), back() {
    for (int bits = 0; bits < 256; ++bits) {
      int count = 0;
      for (int lane = 0; lane < 8; ++lane) {
        back[bits] |= uint64_t(count) << (8 * lane);
        if (bits >> lane & 1) together[bits] |= uint64_t(lane) << (8 * count++);
      }
    }
  }
};
constexpr LaneTable kLaneTable;

PARTUNE_FN __m256i lanes(uint64_t bytes) { return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(bytes))); }
#endif

// A group of kGroup<T> entries is moved at once.
#if defined(__AVX512F__)
// By mask, as the compiler's own header leaves the unmasked forms uninitialized.
PARTUNE_FN __m512i widen_bits(const void* from) {
  return _mm512_maskz_cvtepu16_epi32(__mmask16(0xffff),
                                     _mm256_loadu_si256(static_cast<const __m256i*>(from)));
}
PARTUNE_FN __m256i narrow_bits(__m512i wide) { return _mm512_maskz_cvtepi32_epi16(__mmask16(0xffff), wide); }

template <typename T>
constexpr int kGroup = sizeof(T) == 8 ? 8 : 16;

// The forms that keep the other lanes take two thirds of the time of those that clear them on Zen 4,
// and straight to memory the instruction takes a hundred cycles.
template <typename T>
PARTUNE_FN void compress_group(const T* from, uint32_t bits, T* to) {
  if constexpr (sizeof(T) == 8) {
    const __m512i values = _mm512_loadu_si512(from);
    _mm512_storeu_si512(to, _mm512_mask_compress_epi64(values, __mmask8(bits), values));
  } else if constexpr (sizeof(T) == 4) {
    const __m512i values = _mm512_loadu_si512(from);
    _mm512_storeu_si512(to, _mm512_mask_compress_epi32(values, __mmask16(bits), values));
  } else {
    const __m512i values = widen_bits(from);
    const __m512i packed = _mm512_mask_compress_epi32(values, __mmask16(bits), values);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow_bits(packed));
  }
}

// Frozen entries get the bits that they had.
template <typename T>
PARTUNE_FN void expand_group(const T* from, uint32_t bits, T* to) {
  if constexpr (sizeof(T) == 8) {
    const __m512i before = _mm512_loadu_si512(to);
    _mm512_storeu_si512(to, _mm512_mask_expand_epi64(before, __mmask8(bits), _mm512_loadu_si512(from)));
  } else if constexpr (sizeof(T) == 4) {
    const __m512i before = _mm512_loadu_si512(to);
    _mm512_storeu_si512(to, _mm512_mask_expand_epi32(before, __mmask16(bits), _mm512_loadu_si512(from)));
  } else {
    const __m512i spread = _mm512_mask_expand_epi32(widen_bits(to), __mmask16(bits), widen_bits(from));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow_bits(spread));
  }
}
#else
template <typename T>
constexpr int kGroup = 8;

template <typename T>
PARTUNE_FN void compress_group(const T* from, uint32_t bits, T* to) {
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm256_permutevar8x32_epi32(values, lanes(kLaneTable.together[bits])));
    return;
  }
#endif
  PARTUNE_UNROLL
  for (int i = 0; i < kGroup<T>; ++i) {
    *to = from[i];
    to += bits >> i & 1u;
  }
}

template <typename T>
PARTUNE_FN void expand_group(const T* from, uint32_t bits, T* to) {
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    // Blended, not stored by mask, which is slow on AMD; frozen entries get the bits that they had.
    const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    const __m256i spread = _mm256_permutevar8x32_epi32(values, lanes(kLaneTable.back[bits]));
    const __m256i lane_bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i live =
        _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(bits)), lane_bits), lane_bits);
    __m256i* place = reinterpret_cast<__m256i*>(to);
    _mm256_storeu_si256(place, _mm256_blendv_epi8(_mm256_loadu_si256(place), spread, live));
    return;
  }
#endif
  PARTUNE_UNROLL
  for (int i = 0; i < kGroup<T>; ++i) {
    to[i] = bits >> i & 1u ? *from : to[i];
    from += bits >> i & 1u;
  }
}
#endif

template <typename T>
PARTUNE_FN uint32_t group_bits(const uint32_t* words, int first) {
  return words[first / 32] >> first % 32 & ((1u << kGroup<T>)-1u);
}

// Writes the live ones of `count` entries side by side and returns how many they are. `to` has
// kCompressSlack places more than those.
template <typename T>
int compress(const T* from, const uint32_t* words, int count, T* to) {
  const T* const start = to;
  int i = 0;
  for (; i + kGroup<T> <= count; i += kGroup<T>) {
    const uint32_t bits = group_bits<T>(words, i);
    compress_group(from + i, bits, to);
    to += __builtin_popcount(bits);
  }
  for (; i < count; ++i) {
    if (words[i / 32] >> i % 32 & 1u) *to++ = from[i];
  }
  return int(to - start);
}

// Writes entries that compress() has put together back to where they were. `from` can be read for
// kCompressSlack places more.
template <typename T>
void expand(const T* from, const uint32_t* words, int count, T* to) {
  int i = 0;
  for (; i + kGroup<T> <= count; i += kGroup<T>) {
    const uint32_t bits = group_bits<T>(words, i);
    expand_group(from, bits, to + i);
    from += __builtin_popcount(bits);
  }
  for (; i < count; ++i) {
    if (words[i / 32] >> i % 32 & 1u) to[i] = *from++;
  }
}

}  // namespace
}  // namespace PARTUNE_ISA
}  // namespace partune
