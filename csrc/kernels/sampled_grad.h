// Family sampled_grad: values += the entries of gradᵀ @ input [rows, columns] that a CSR names, with grad
// [tokens, rows] and input [tokens, columns].
//
// Operations: 2·tokens·nnz, of the dense product's 2·tokens·rows·columns. Bytes, of elements of b bytes:
//   sampled, CPU: by each of row_parts·column_parts threads, its rows of the product and its columns read
//     and packed, (rows/row_parts + columns/column_parts)·tokens·(b + 2·p), with p bytes of a packed
//     element, 2 of bfloat16, else those of the sums; per block of kPackedBytes/p tokens,
//     nnz·kPackedBytes from the L2 cache, 4·nnz of columns and 2·sizeof(Real)·nnz of values.
//   sampled, CUDA: nnz·tokens·b of input, from the L2 cache where it holds it; grad and columns once.
//   blocks: as sampled, but with nnz/kBlockSide for nnz where an L2 cache or columns are read: a load serves
//     all entries that a block has in its column.
//   panels: factors, as the dense product reads them; rows·columns entries of the workspace written, and
//     nnz of them read, from caches; 4·nnz of columns and 2·sizeof(Real)·nnz of values.
#pragma once
#include "csr.h"

namespace partune {

// Rows, and columns, of a block of route "blocks": of a CSR whose rows 4r to 4r + 3 have the same columns, in
// runs of 4 that begin at multiples of 4.
constexpr int kBlockSide = 4;

}  // namespace partune
