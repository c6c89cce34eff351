// Philox for many elements at once: the same words as philox(), bit for bit.
#pragma once
#include "philox.h"
#include "vector.h"

namespace partune {

struct PhiloxWords {
  Words word[4];  // the low half of each 64-bit lane counts
};

// A counter's word sits in the low half of a lane; what gathers in the high half never reaches a
// product, so that a round is two products, two shifts and four exclusive ors.
PARTUNE_FN PhiloxWords philox(Words index, uint32_t step, uint32_t parameter_id, PhiloxKey key) {
  const Words multiplier0 = Words{} + 0xD2511F53u, multiplier1 = Words{} + 0xCD9E8D57u;
  Words c0 = index, c1 = index >> 32, c2 = Words{} + step, c3 = Words{} + parameter_id;
  PARTUNE_UNROLL
  for (int round = 0; round < 10; ++round) {
    const Words product0 = multiply_low_halves(c0, multiplier0);
    const Words product1 = multiply_low_halves(c2, multiplier1);
    c0 = (product1 >> 32) ^ c1 ^ uint64_t(key.low);
    c1 = product1;
    c2 = (product0 >> 32) ^ c3 ^ uint64_t(key.high);
    c3 = product0;
    key.low += 0x9E3779B9u;
    key.high += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Stores the low halves of a vector's lanes.
PARTUNE_FN void store_low_halves(Words words, uint32_t* to) {
  typedef uint32_t LowHalves __attribute__((vector_size(kVectorBytes / 2)));
  const LowHalves low = __builtin_convertvector(words, LowHalves);
  __builtin_memcpy(to, &low, sizeof low);
}

}  // namespace partune
