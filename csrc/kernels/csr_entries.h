// Family csr_entries: the entries of a CSR between a matrix and a vector. What CPU and CUDA share: where
// the entries of one matrix are, and how one becomes another's dtype.
//
// Bytes moved per entry, float32: 4 index + 4 value, and one 32-byte sector (a 64-byte line on the CPU)
// of the matrix, which scatter reads and writes, less what neighbours share: at 5 % a line of 16 floats
// is touched with probability 1 - 0.95^16 = 0.56.
#pragma once
#include "csr.h"

namespace partune {

// The dtypes of a matrix and its values. Where they are one, its bits alone count.
enum CsrEntryTypes {
  kBits16,
  kBits32,
  kBits64,
  kBFloat16AsFloat32,
  kHalfAsFloat32,
  kCsrEntryTypesCount,
};

// A matrix and the vector of its selected entries; one of the two is written. Strides count elements.
struct MatrixEntries {
  void* matrix;
  void* values;  // [nnz]
  const int64_t* crow_indices;
  const int32_t* col_indices;
  int64_t rows, nnz;
  int64_t row_stride, column_stride;
};

template <typename Word>
PARTUNE_FN void convert(Word from, Word& to) {
  to = from;
}
PARTUNE_FN void convert(float from, BFloat16& to) { round_nearest(from, to); }
PARTUNE_FN void convert(float from, Half& to) { round_nearest(from, to); }
PARTUNE_FN void convert(BFloat16 from, float& to) { to = widen(from); }
PARTUNE_FN void convert(Half from, float& to) { to = widen(from); }

}  // namespace partune
