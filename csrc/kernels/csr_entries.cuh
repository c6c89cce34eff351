// Family csr_entries on CUDA: one launch takes a list of matrices, which travels by value in its
// parameters.
//
// Bytes moved: as csr_entries.h counts them, the matrix in 32-byte sectors. Scatter doesn't ask for what is
// beside an entry, but memory with error correction reads it to write a sector.
#pragma once
#include "csr_entries.h"
#include "entry_tiles.cuh"

namespace partune {

constexpr int kCsrEntriesMatrices = 480;  // what 32 KB of launch parameters hold

struct CsrEntriesBatch {
  int count;
  int first_block[kCsrEntriesMatrices + 1];
  MatrixEntries matrices[kCsrEntriesMatrices];
};
static_assert(sizeof(CsrEntriesBatch) <= kLaunchParameterBytes, "a launch must fit its parameters");

// Where in memory four consecutive entries of a matrix are; at its first, which can be read too, for those
// beyond the last.
struct EntryOffsets {
  int64_t at[4];
};

PARTUNE_FN EntryOffsets entry_offsets(const MatrixEntries& m, const int64_t (&tile_rows)[2], int64_t position,
                                      int count) {
  const Pack4<int32_t> columns = load_pack(m.col_indices + position, count, is_aligned(m.col_indices));
  int64_t row = row_of(m.crow_indices, tile_rows[0], tile_rows[1], position);
  EntryOffsets offsets = {};
  PARTUNE_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (i < count) {
      while (m.crow_indices[row + 1] <= position + i) ++row;
      offsets.at[i] = row * m.row_stride + columns.at[i] * m.column_stride;
    }
  }
  return offsets;
}

// SASS <unsigned int, unsigned int>: LDG.E.128, STG.E.128
// SASS <BFloat16, float>: LDG.E.128, STG.E.128
template <typename Stored, typename Value, int kBlock>
__global__ void __launch_bounds__(kBlock) gather_csr_kernel(LAUNCH_PARAMETER(CsrEntriesBatch) batch) {
  SHARED(int64_t, tile_rows, [2]);
  const int number = matrix_of_block(batch, int(blockIdx.x));
  const MatrixEntries& m = batch.matrices[number];
  const EntryTile<kBlock> tile(int(blockIdx.x) - batch.first_block[number], m.nnz);
  find_tile_rows(m.crow_indices, m.rows, tile, tile_rows);
  __syncthreads();
  const Stored* matrix = static_cast<const Stored*>(m.matrix);
  Value* values = static_cast<Value*>(m.values);
  const EntryOffsets offsets = entry_offsets(m, tile_rows, tile.position, tile.count);
  Pack4<Value> gathered;
  PARTUNE_UNROLL
  for (int i = 0; i < 4; ++i) convert(matrix[offsets.at[i]], gathered.at[i]);
  store_pack(gathered, values + tile.position, tile.count, is_aligned(values));
}

// SASS <unsigned int, unsigned int>: LDG.E.128 x2
// SASS <BFloat16, float>: LDG.E.128 x2
template <typename Stored, typename Value, int kBlock>
__global__ void __launch_bounds__(kBlock) scatter_csr_kernel(LAUNCH_PARAMETER(CsrEntriesBatch) batch) {
  SHARED(int64_t, tile_rows, [2]);
  const int number = matrix_of_block(batch, int(blockIdx.x));
  const MatrixEntries& m = batch.matrices[number];
  const EntryTile<kBlock> tile(int(blockIdx.x) - batch.first_block[number], m.nnz);
  find_tile_rows(m.crow_indices, m.rows, tile, tile_rows);
  __syncthreads();
  Stored* matrix = static_cast<Stored*>(m.matrix);
  const Value* values = static_cast<const Value*>(m.values);
  const Pack4<Value> pack = load_pack(values + tile.position, tile.count, is_aligned(values));
  const EntryOffsets offsets = entry_offsets(m, tile_rows, tile.position, tile.count);
  PARTUNE_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (i < tile.count) convert(pack.at[i], matrix[offsets.at[i]]);
  }
}

}  // namespace partune
