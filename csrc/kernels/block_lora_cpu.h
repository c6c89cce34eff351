// The CPU bodies of family block_lora, as tables: one is built per ISA. Whoever calls hands in the
// adapters as matrices of [ranks, columns], scales and arms folded in.
#pragma once
#include "block_lora.h"

namespace partune {

// Tokens that a body takes at a time, and columns of what it keeps widened beside them.
constexpr int kLoraTile = 48;
constexpr int kLoraColumns = 512;

template <typename Real>
struct BlockLoraMember {
  void* output;         // [tokens, out]; or, backward, its gradient
  const Real* up;       // [ranks, out]: scale·ΣBᵀ
  int64_t out;          // columns
  int64_t first, rank;  // its ranks are [first, first + rank)
  int64_t partial;      // backward: where its sums begin in a block's
};

template <typename Real>
struct BlockLoraTask {
  BlockLoraShape shape;
  const void* input;
  const Real* down;  // [ranks, width]
  Real* hidden;      // [tokens, ranks]; written forward, read backward
  const BlockLoraMember<Real>* members;
  int64_t member_count;
  BlockLoraDropout dropout;
  uint32_t step;
  PhiloxKey key;
  // Backward.
  void* grad_input;  // null: not wanted
  bool accumulate;   // add to grad_input
  bool down_grad, up_grad;
  // Of a block of tokens: hidden's gradient, [block_tokens, ranks]; Aᵀ's sums, [ranks, width]; the
  // members' sums, [rank, out] each.
  Real* partial;
  int64_t block_tokens, partial_size;
};

// A matrix of sums over blocks: out[i·row_stride + j·column_stride + arm·arm_stride] =
// scale·Σ partial[block·stride + i·columns + j].
template <typename Real>
struct BlockLoraSum {
  const Real* partial;
  int64_t blocks, stride;
  int64_t rows, columns;
  Real scale;
  Real* out;
  int64_t row_stride, column_stride;
  int64_t arms, arm_stride;
};

// scale·ΣBᵀ of up [arms, out, rank], as [rank, out].
template <typename Real>
struct BlockLoraUp {
  const Real* up;
  int64_t arms, out, rank;
  Real scale;
  Real* packed;
};

template <typename Real>
struct BlockLoraBodies {
  // Tokens [first, last).
  void (*forward)(const BlockLoraTask<Real>&, int64_t first, int64_t last);
  // Blocks of block_tokens [first, last).
  void (*backward)(const BlockLoraTask<Real>&, int64_t first, int64_t last);
  // Columns [first, last).
  void (*sum)(const BlockLoraSum<Real>&, int64_t first, int64_t last);
  void (*pack)(const BlockLoraUp<Real>&, int64_t first, int64_t last);
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

}  // namespace partune
