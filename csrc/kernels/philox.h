// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), the one
// generator of partune on every device: key = seed, counter = (element index low, high, step,
// parameter id). The index is global, so that a shard draws what the whole would.
#pragma once
#include "platform.h"

namespace partune {

struct PhiloxKey {
  uint32_t low, high;
};
struct PhiloxBlock {
  uint32_t word[4];
};

PARTUNE_FN uint32_t multiply_high(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }

PARTUNE_FN PhiloxBlock philox(uint64_t index, uint32_t step, uint32_t parameter_id, PhiloxKey key) {
  uint32_t c0 = uint32_t(index), c1 = uint32_t(index >> 32), c2 = step, c3 = parameter_id;
  PARTUNE_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = multiply_high(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const uint32_t high1 = multiply_high(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ key.low;
    c1 = low1;
    c2 = high0 ^ c3 ^ key.high;
    c3 = low0;
    key.low += 0x9E3779B9u;
    key.high += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// 24 bits of a word as a uniform float in [0, 1).
PARTUNE_FN float uniform_from_bits(uint32_t word) { return float(word >> 8) * 0x1p-24f; }

}  // namespace partune
