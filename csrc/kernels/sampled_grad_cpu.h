// The CPU bodies of family sampled_grad, as a table: one is built per ISA.
#pragma once
#include "read_ahead.h"
#include "sampled_grad.h"

namespace partune {

// Tokens are taken a block at a time; of a block, a column of a factor is packed into so many bytes.
constexpr int64_t kPackedBytes = 1024;

// Of a block of tokens, some columns of the product: factors packed [rows or columns, kPackedBytes], zeros
// behind the last token.
template <typename Real>
struct SampledGradPanel {
  const char *grad, *input;  // from the first row, and from first_column
  int64_t tokens, first_column, last_column;
  CsrView csr;
  Real* values;        // [nnz], added to
  ReadAhead ahead[2];  // what is packed next, of grad and of input
};

template <typename Real>
struct SampledGradBodies {
  int64_t block_tokens;
  // Packs columns [begin, end) of `tokens` rows of a factor, which lie `stride` apart.
  void (*pack)(const void* factor, int64_t stride, int64_t tokens, int64_t begin, int64_t end, char* packed);
  // The entries of rows [first_row, last_row) before `end` in the panel's columns. By row from first_row on,
  // cursors say where they begin, and afterwards where they end. An entry's bits don't depend on ranges.
  // Of blocks, bounds lie between them, and cursors are by block row, and of its first row.
  void (*product)(const SampledGradPanel<Real>& panel, int64_t first_row, int64_t last_row, int64_t end,
                  int64_t* cursors);
  void (*block_product)(const SampledGradPanel<Real>& panel, int64_t first_row, int64_t last_row, int64_t end,
                        int64_t* cursors);
  // The entries [begin, end), from rows first_row and on of the dense product.
  void (*compact)(const void* panel, int64_t columns, int64_t first_row, const CsrView& csr, int64_t begin,
                  int64_t end, Real* values);
};

struct SampledGradCpu {
  SampledGradBodies<double> float64;
  SampledGradBodies<float> float32, bfloat16, half;
};

namespace baseline {
extern const SampledGradCpu sampled_grad_cpu;
}
namespace avx2 {
extern const SampledGradCpu sampled_grad_cpu;
}
namespace avx512 {
extern const SampledGradCpu sampled_grad_cpu;
}
namespace avx512_bf16 {  // nothing in it for these bodies
using avx512::sampled_grad_cpu;
}

}  // namespace partune
