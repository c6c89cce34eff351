// Family half_mask: AdamW on half of a matrix, whose other half is neither updated nor has state. What
// CPU and CUDA share: how the live half is told, and the bits of a mask.
//
// Bytes moved by a step in float32, rows: 28 per live entry, nothing for the others; columns: the
// gradient's read, the weight's read and write of whole lines, 12 per entry, and 16 per live entry;
// elements: the same, 12 per entry and 16 per live entry, so 20 where half of them are live (AdamW over
// all moves 28), and 1/8 per entry for a stored mask.
#pragma once
#include "sparse_adamw.h"

namespace partune {

constexpr int kHalfTile = 1024;  // entries, and those between two ranks of a mask
constexpr int kHalfTileWords = kHalfTile / 32;
constexpr int kCounterEntries = 128;  // whose mask bits one Philox counter draws
constexpr uint32_t kMaskDraw = 0;     // the counter's step word: steps, which round, count from 1

enum HalfLevel { kHalfRows, kHalfColumns, kHalfElements };

// `entries` holds weight, gradient and state; its nnz counts live entries. State is compact: [live_count,
// columns] for rows, [rows, live_count] for columns, [nnz] in order for elements.
struct HalfMatrix {
  SparseAdamWMatrix entries;
  const int32_t* live;  // rows or columns that are live, ascending
  int64_t live_count;
  const uint32_t* mask;  // elements: bit index mod 32 of word index / 32; null: drawn
  const int64_t* ranks;  // elements: live entries before each tile, [tiles + 1]
  uint32_t mask_id;
  HalfLevel level;
};

PARTUNE_FN int64_t entries_of(const SparseAdamWMatrix& m) { return m.rows * m.columns; }

PARTUNE_FN bool lies_flat(const SparseAdamWMatrix& m) {
  return m.weight_column_stride == 1 && m.grad_column_stride == 1 &&
         (m.rows <= 1 || (m.weight_row_stride == m.columns && m.grad_row_stride == m.columns));
}

PARTUNE_FN int count_bits(uint32_t word) {
#ifdef __CUDACC__
  return __popc(word);
#else
  return __builtin_popcount(word);
#endif
}

// The word without the bits of entries from `left` on; `left` may be negative or over 32.
PARTUNE_FN uint32_t first_bits(uint32_t word, int64_t left) {
  return left >= 32 ? word : left <= 0 ? 0u : word & ((1u << left) - 1u);
}

}  // namespace partune
