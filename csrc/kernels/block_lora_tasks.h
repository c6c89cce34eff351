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

// [ranks, width] as adapters are stored: scale times the sum of `arms` matrices, one behind the other, each
// [ranks, width] or, transposed, [width, ranks].
template <typename Real>
struct ThinMatrix {
  const Real* data;
  int64_t ranks, width, arms;
  bool transposed;
  Real scale;
};

// [tokens, ranks] whose rows are `stride` apart.
template <typename Real>
struct LoraFactors {
  const Real* data;
  int64_t tokens, ranks, stride;
};

// One reading of a matrix x: products = x·thinᵀ in parts, or sums = factorsᵀ·x in parts; or both, of a matrix
// without dropout.
template <typename Real>
struct LoraRead {
  LoraMatrix x;
  ThinMatrix<Real> thin;
  Real* products;  // [tiles of columns, tokens, ranks]; null: not wanted
  LoraFactors<Real> factors;
  Real* sums;  // [blocks of tokens, ranks, width]; null: not wanted
  int64_t block_tokens;
};

// out = (add ? out : 0) + factors·thin.
template <typename Real>
struct LoraWrite {
  LoraMatrix out;
  ThinMatrix<Real> thin;
  LoraFactors<Real> factors;
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
