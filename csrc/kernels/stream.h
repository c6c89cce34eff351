// Stores that go around the caches: what is larger than them would only push other data out, and a
// plain store reads its line from memory first.
#pragma once
#include "vector.h"

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace partune {

#if defined(__x86_64__)
PARTUNE_FN void store_around_caches(const char* from, char* to) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to),
                      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#else
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#endif
}
// Orders streamed stores before what the thread does next.
PARTUNE_FN void finish_stream() { _mm_sfence(); }
#else
PARTUNE_FN void store_around_caches(const char* from, char* to) { __builtin_memcpy(to, from, kVectorBytes); }
PARTUNE_FN void finish_stream() {}
#endif

// Copies `bytes` to memory around the caches, but for what lies before and after whole vectors.
PARTUNE_FN void stream(const void* from, void* to, int64_t bytes) {
  const char* source = static_cast<const char*>(from);
  char* target = static_cast<char*>(to);
  const int64_t misaligned = int64_t(-reinterpret_cast<uintptr_t>(to) & (kVectorBytes - 1));
  int64_t done = misaligned < bytes ? misaligned : bytes;
  __builtin_memcpy(target, source, uint64_t(done));
  for (; done + kVectorBytes <= bytes; done += kVectorBytes)
    store_around_caches(source + done, target + done);
  __builtin_memcpy(target + done, source + done, uint64_t(bytes - done));
}

}  // namespace partune
