// Family block_lora: a frozen linear's result y += scale·t·Bᵀ with t = x·Aᵀ, where A reads the sum of the
// input's chunks (share "input") or B is the sum of its arms (share "rank"). What CPU and CUDA share.
//
// For T tokens, R ranks in all, `in` features of `width` = in/chunks and `out` of all members: forward
// 2·T·R·(width + out) operations, backward twice as many (without dx or the adapters' gradients, less).
// Bytes moved: forward T·(in + 2·out) elements, backward T·(out + 3·in), beside those of rank R; the frozen
// product alone has 4·T·in·out operations.
#pragma once
#include "philox.h"

namespace partune {

// A feature's draw is half a word of a counter: element i has draw i mod 8 of counter i/8, words in
// order, low halves first. It is dropped where its draw is below `dropped`.
constexpr int kDrawsPerCounter = 8;

struct BlockLoraDropout {
  uint32_t dropped;  // of 2^16; 0: no dropout
  uint32_t layer_id;
};

// The shape of a group's task. Matrices are [tokens, …] and contiguous.
struct BlockLoraShape {
  int64_t tokens, features, chunks;
  int64_t width;  // features/chunks, which the down-projections read
  int64_t ranks;  // of all members
};

// What is kept is scaled by this.
template <typename Real>
PARTUNE_FN Real dropout_scale(const BlockLoraDropout& dropout) {
  return divide(Real(65536), Real(65536u - dropout.dropped));
}

}  // namespace partune
