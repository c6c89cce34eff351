// A selection as the bodies read it, and where its entries are.
#pragma once
#include "platform.h"

namespace partune {

struct CsrView {
  const int64_t* crow_indices;  // [rows + 1]
  const int32_t* col_indices;   // [nnz]
  int64_t rows, nnz;
};

// The row of entry `position`: the last r with crow_indices[r] <= position, among [first, last].
PARTUNE_FN int64_t row_of(const int64_t* crow_indices, int64_t first, int64_t last, int64_t position) {
  while (first < last) {
    const int64_t middle = first + (last - first + 1) / 2;
    if (crow_indices[middle] <= position) {
      first = middle;
    } else {
      last = middle - 1;
    }
  }
  return first;
}

}  // namespace partune
