// The CPU bodies of family block_lora, as tables: one is built per ISA. Whoever calls hands in the
// adapters as matrices of [ranks, columns], scales and arms folded in.
#pragma once
#include "block_lora.h"

namespace partune {

// Of matrices that are laid out for the bodies: elements from one row to the next, an odd number of whole
// lines, so that as many rows as a cache has ways don't all lie in one set of it.
constexpr int kLineBytes = 64;
template <typename Real>
constexpr int64_t pitch_of(int64_t columns) {
  constexpr int64_t line = kLineBytes / int64_t(sizeof(Real));
  return ((columns + line - 1) / line | 1) * line;
}

// Tokens that a body takes at a time, and columns of what it keeps widened beside them.
constexpr int kLoraTile = 48;
constexpr int kLoraColumns = 512;

template <typename Real>
struct BlockLoraMember {
  void* output;          // [tokens, out]; or, backward, its gradient
  const Real* up;        // [ranks, out]: scale·ΣBᵀ
  int64_t out, pitch;    // columns, and from row to row
  const Real* up_pairs;  // forward: of bfloat16, [ranks/2, out], in the place of `up`; or null
  int64_t first, rank;   // its ranks are [first, first + rank)
  int64_t partial;       // backward: where its sums begin in a block's
};

template <typename Real>
struct BlockLoraTask {
  BlockLoraShape shape;
  const void* input;
  const Real* down;  // [ranks, width]
  int64_t down_pitch;
  const Real* down_pairs;  // backward: as up_pairs
  Real* hidden;            // [tokens, ranks]; written forward, read backward
  const BlockLoraMember<Real>* members;
  int64_t member_count;
  BlockLoraDropout dropout;
  uint32_t step;
  PhiloxKey key;
  // Backward.
  void* grad_input;  // null: not wanted
  bool accumulate;   // add to grad_input
  bool down_grad, up_grad;
  // Of a block of tokens: Aᵀ's sums, [ranks, width]; the members' sums, [rank, out] each, all in the pitch of
  // the adapters; hidden's gradient, [block_tokens, ranks], from `grad_hidden` on.
  Real* partial;
  int64_t block_tokens, grad_hidden, partial_size;
};

// A matrix of sums over blocks: out[i·row_stride + j·column_stride + arm·arm_stride] =
// scale·Σ partial[block·stride + i·pitch + j].
template <typename Real>
struct BlockLoraSum {
  const Real* partial;
  int64_t blocks, stride;
  int64_t rows, columns, pitch;
  Real scale;
  Real* out;
  int64_t row_stride, column_stride;
  int64_t arms, arm_stride;
};

// scale·ΣBᵀ of up [arms, out, rank], as [rank, out] in a pitch.
template <typename Real>
struct BlockLoraUp {
  const Real* up;
  int64_t arms, out, rank, pitch;
  Real scale;
  Real* packed;
};

// Two rows of a matrix [ranks, columns] in a pitch as one, of pairs of bfloat16.
template <typename Real>
struct BlockLoraPairs {
  const Real* thin;
  int64_t ranks, pitch;
  Real* pairs;
};
// Of so many ranks at most.
constexpr int64_t kMostPairedRanks = 64;

template <typename Real>
struct BlockLoraBodies {
  // Tokens [first, last).
  void (*forward)(const BlockLoraTask<Real>&, int64_t first, int64_t last);
  // Blocks of block_tokens [first, last).
  void (*backward)(const BlockLoraTask<Real>&, int64_t first, int64_t last);
  // Columns [first, last).
  void (*sum)(const BlockLoraSum<Real>&, int64_t first, int64_t last);
  void (*pack)(const BlockLoraUp<Real>&, int64_t first, int64_t last);
  // Where the machine multiplies pairs; else null.
  void (*pair)(const BlockLoraPairs<Real>&, int64_t first, int64_t last);
};

struct BlockLoraCpu {
  BlockLoraBodies<double> float64;
  BlockLoraBodies<float> float32, bfloat16, half;
};

namespace baseline {
extern const BlockLoraCpu block_lora_cpu;
}
namespace avx2 {
extern const BlockLoraCpu block_lora_cpu;
}
namespace avx512 {
extern const BlockLoraCpu block_lora_cpu;
}
namespace avx512_bf16 {
extern const BlockLoraCpu block_lora_cpu;
}

}  // namespace partune
