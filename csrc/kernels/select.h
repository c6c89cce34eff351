// Family select: which k entries of a matrix score best. What CPU and CUDA share: scores become
// unsigned keys of the same order, so that selecting is counting.
//
// Bytes moved: one reading of the scores per pass (histogram, collection, emission), 4 per selected
// entry out. Factors: no score is ever stored beyond a panel; each pass forms the product anew.
#pragma once
#include "philox.h"

namespace partune {

// The better score has the larger key. NaN is behind every number, -0 equals +0.
PARTUNE_FN uint32_t score_key(float score, bool largest) {
  const uint32_t bits = float_bits(score);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t number = magnitude == 0 ? 0 : bits;
  const uint32_t ordered = number >> 31 ? ~number : number | 0x80000000u;
  return magnitude > 0x7f800000u ? 0 : largest ? ordered : ~ordered;
}

PARTUNE_FN uint64_t score_key(double score, bool largest) {
  const uint64_t bits = double_bits(score);
  const uint64_t sign = uint64_t(1) << 63;
  const uint64_t magnitude = bits & ~sign;
  const uint64_t number = magnitude == 0 ? 0 : bits;
  const uint64_t ordered = number >> 63 ? ~number : number | sign;
  return magnitude > 0x7ff0000000000000u ? 0 : largest ? ordered : ~ordered;
}

template <typename Real>
struct KeyOf;
template <>
struct KeyOf<float> {
  using Type = uint32_t;
};
template <>
struct KeyOf<double> {
  using Type = uint64_t;
};

}  // namespace partune
