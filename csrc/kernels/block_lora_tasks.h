// What the CUDA kernels of family block_lora are told: raw pointers and sizes.
#pragma once
#include "block_lora.h"

namespace partune {

// [tokens, chunks·width], whose chunks are read summed or written alike, some elements dropped.
struct LoraMatrix {
  void* data;
  int64_t tokens, chunks, width;
  BlockLoraDropout dropout;
  const int64_t *seed, *step;  // on the device; null: no dropout
};

// [ranks, width] as adapters are stored: scale·Σ over arms of data[arm·arm_stride + rank·rank_stride +
// column·column_stride].
template <typename Real>
struct ThinMatrix {
  const Real* data;
  int64_t ranks, rank_stride, column_stride, arms, arm_stride;
  Real scale;
};

// One reading of a matrix x: products = x·thinᵀ in parts, and sums = factorsᵀ·x in parts.
template <typename Real>
struct LoraRead {
  LoraMatrix x;
  ThinMatrix<Real> thin;
  Real* products;       // [tiles of columns, tokens, ranks]; null: not wanted
  const Real* factors;  // [tokens, factor_stride], of which the first `ranks` count
  int64_t factor_stride;
  Real* sums;  // [blocks of tokens, ranks, width]; null: not wanted
  int64_t block_tokens;
};

// out = (add ? out : 0) + factors·thin.
template <typename Real>
struct LoraWrite {
  LoraMatrix out;
  ThinMatrix<Real> thin;
  const Real* factors;  // [tokens, factor_stride]
  int64_t factor_stride;
  bool add;
};

// out[i·row_stride + j·column_stride + arm·arm_stride] =
// scale·Σ partial[part·part_stride + i·columns + j].
template <typename Real>
struct LoraSum {
  const Real* partial;
  int64_t parts, part_stride, rows, columns;
  Real scale;
  Real* out;
  int64_t row_stride, column_stride, arms, arm_stride;
};

}  // namespace partune
