// CUDA kernels of family sampled_grad.
//
// Sampled: a block of tokens of both factors is packed, a column's tokens side by side, by
// pack_factor_kernel; sampled_grad_kernel then forms each entry as a dot product of two packed columns, a
// warp for kWarpEntries entries, and adds it to its value; block_grad_kernel forms 4×4 blocks of entries, a
// warp for each, with the same sums. Blocks of tokens follow each other on a stream, so every sum has one
// order.
//
// Bytes moved: as sampled_grad.h counts them.
#pragma once
#include "kit.cuh"
#include "sampled_grad.h"

namespace partune {

constexpr int kSampledGradBlock = 128;
constexpr int kPackTokens = 32;
constexpr int kPackColumns = 32;
// Packed columns of 4096 by 4096 take 8 MB in 16 bits: an L2 cache holds them.
constexpr int kTokenBlock = 512;
constexpr int kWarpEntries = 4;

// What is read or written at once.
template <typename Stored>
struct alignas(16) Pack16 {
  static constexpr int kCount = 16 / int(sizeof(Stored));
  Stored at[kCount];
};

// Tokens that a warp reads of a column at once.
template <typename Stored>
constexpr int kWarpTokens = 32 * Pack16<Stored>::kCount;

// packed [columns, kTokenBlock] of factor [tokens, columns], whose rows lie `stride` apart: a block packs
// kPackTokens × kPackColumns, zeros for tokens beyond the last.
// SASS: none (a tile is read and written by elements; the warps' accesses are whole lines)
template <typename Stored, int kBlock>
__global__ void __launch_bounds__(kBlock)
    pack_factor_kernel(const Stored* factor, int64_t stride, int64_t tokens, int64_t columns,
                       Stored* packed) {
  // Rows an odd number of words long: then a column's elements lie in different banks.
  SHARED(Stored, tile, [kPackTokens][kPackColumns + (sizeof(Stored) == 2 ? 2 : 1)]);
  constexpr int kStep = kBlock / 32;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int64_t first_token = int64_t(blockIdx.y) * kPackTokens;
  const int64_t first_column = int64_t(blockIdx.x) * kPackColumns;
  PARTUNE_UNROLL
  for (int i = 0; i < kPackTokens; i += kStep) {
    const int64_t token = first_token + i + warp, column = first_column + lane;
    Stored value = {};
    if (token < tokens && column < columns) value = factor[token * stride + column];
    tile[i + warp][lane] = value;
  }
  __syncthreads();
  PARTUNE_UNROLL
  for (int i = 0; i < kPackColumns; i += kStep) {
    const int64_t column = first_column + i + warp;
    if (column < columns) packed[column * kTokenBlock + first_token + lane] = tile[lane][i + warp];
  }
}

// The row of an entry, or the first of its kRows rows: the last that begins at it or before.
template <int kRows = 1>
PARTUNE_FN int64_t row_of_entry(const CsrView& csr, int64_t entry) {
  int64_t low = 0, high = csr.rows / kRows;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (csr.crow_indices[middle * kRows] <= entry) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low * kRows;
}

// values += the entries' dot products over `tokens` packed tokens, a multiple of kWarpTokens.
// SASS: LDG.E.128 x8
template <typename Stored, typename Real, int kBlock>
__global__ void __launch_bounds__(kBlock)
    sampled_grad_kernel(const Stored* grad, const Stored* input, int64_t tokens, CsrView csr, Real* values) {
  using Pack = Pack16<Stored>;
  const int lane = int(threadIdx.x) % 32;
  const int64_t warp = int64_t(blockIdx.x) * (kBlock / 32) + threadIdx.x / 32;
  const int64_t first = warp * kWarpEntries;
  const Pack* left[kWarpEntries];
  const Pack* right[kWarpEntries];
  // Behind the last entry the last is formed again, and not written.
  PARTUNE_UNROLL
  for (int i = 0; i < kWarpEntries; ++i) {
    const int64_t entry = first + i < csr.nnz ? first + i : csr.nnz - 1;
    const int64_t row = row_of_entry(csr, entry);
    left[i] = reinterpret_cast<const Pack*>(grad + row * kTokenBlock) + lane;
    right[i] = reinterpret_cast<const Pack*>(input + int64_t(csr.col_indices[entry]) * kTokenBlock) + lane;
  }
  Real sums[kWarpEntries] = {};
  for (int64_t token = 0; token < tokens; token += kWarpTokens<Stored>) {
    Pack a[kWarpEntries], b[kWarpEntries];
    PARTUNE_UNROLL
    for (int i = 0; i < kWarpEntries; ++i) {
      a[i] = left[i][token / Pack::kCount];
      b[i] = right[i][token / Pack::kCount];
    }
    PARTUNE_UNROLL
    for (int i = 0; i < kWarpEntries; ++i) {
      PARTUNE_UNROLL
      for (int j = 0; j < Pack::kCount; ++j) {
        sums[i] = multiply_add(Real(widen(a[i].at[j])), Real(widen(b[i].at[j])), sums[i]);
      }
    }
  }
  PARTUNE_UNROLL
  for (int i = 0; i < kWarpEntries; ++i) {
    PARTUNE_UNROLL
    for (int step = 16; step >= 1; step /= 2) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], step);
  }
  PARTUNE_UNROLL
  for (int i = 0; i < kWarpEntries; ++i) {
    if (lane == i && first + i < csr.nnz) values[first + i] += sums[i];
  }
}

// A lane gives half of its sums for the other half of another's, kStep from it, and keeps its own half with
// that added. Each sum is added up in the order of sampled_grad_kernel's.
template <int kStep, int kCount, typename Real>
PARTUNE_FN void exchange_halves(const Real (&sums)[2 * kCount], Real (&kept)[kCount]) {
  const bool upper = (threadIdx.x & kStep) != 0;
  PARTUNE_UNROLL
  for (int i = 0; i < kCount; ++i) {
    const Real given = upper ? sums[i] : sums[i + kCount];
    kept[i] = (upper ? sums[i + kCount] : sums[i]) + __shfl_xor_sync(0xffffffffu, given, kStep);
  }
}

// As sampled_grad_kernel, of a CSR of blocks: 8 loads serve 16 entries, and 16 shuffles add up their sums.
// What bounds it is still the L2 cache, which gives the 4 columns, while a block's neighbours find the rows
// in L1: 4·b bytes for 16 multiply-adds are at 5 TB/s (H100) 10 TFLOP/s of float32 and 20 of 16 bits, of 60
// that plain multiply-adds could do.
// SASS: LDG.E.128 x8
template <typename Stored, typename Real, int kBlock>
__global__ void __launch_bounds__(kBlock)
    block_grad_kernel(const Stored* grad, const Stored* input, int64_t tokens, CsrView csr, Real* values) {
  using Pack = Pack16<Stored>;
  constexpr int kArea = kBlockSide * kBlockSide;
  const int lane = int(threadIdx.x) % 32;
  const int64_t blocks = csr.nnz / kArea;
  const int64_t warp = int64_t(blockIdx.x) * (kBlock / 32) + threadIdx.x / 32;
  // Behind the last block the last is formed again, and not written.
  const int64_t first = smaller(warp, blocks - 1) * kArea;
  const int64_t row = row_of_entry<kBlockSide>(csr, first);
  const int64_t row_begin = csr.crow_indices[row];
  const int64_t row_entries = (csr.crow_indices[row + kBlockSide] - row_begin) / kBlockSide;
  const int64_t place = row_begin + (first - row_begin) / kBlockSide;  // of the block's first entry
  const int64_t column = int64_t(csr.col_indices[place]) / kBlockSide * kBlockSide;
  const Pack* left = reinterpret_cast<const Pack*>(grad + row * kTokenBlock) + lane;
  const Pack* right = reinterpret_cast<const Pack*>(input + column * kTokenBlock) + lane;
  constexpr int kLine = kTokenBlock / Pack::kCount;
  Real sums[kArea] = {};
  for (int64_t token = 0; token < tokens; token += kWarpTokens<Stored>) {
    Pack a[kBlockSide], b[kBlockSide];
    PARTUNE_UNROLL
    for (int i = 0; i < kBlockSide; ++i) {
      a[i] = left[token / Pack::kCount + i * kLine];
      b[i] = right[token / Pack::kCount + i * kLine];
    }
    PARTUNE_UNROLL
    for (int k = 0; k < Pack::kCount; ++k) {
      Real g[kBlockSide];
      PARTUNE_UNROLL
      for (int i = 0; i < kBlockSide; ++i) g[i] = widen(a[i].at[k]);
      PARTUNE_UNROLL
      for (int j = 0; j < kBlockSide; ++j) {
        const Real x = widen(b[j].at[k]);
        PARTUNE_UNROLL
        for (int i = 0; i < kBlockSide; ++i) {
          sums[i * kBlockSide + j] = multiply_add(g[i], x, sums[i * kBlockSide + j]);
        }
      }
    }
  }
  Real eight[8], four[4], two[2], sum[1];
  exchange_halves<16>(sums, eight);
  exchange_halves<8>(eight, four);
  exchange_halves<4>(four, two);
  exchange_halves<2>(two, sum);
  sum[0] += __shfl_xor_sync(0xffffffffu, sum[0], 1);
  const int i = lane / 2;  // whose sum this lane has, and its neighbour
  if (lane % 2 == 0 && warp < blocks) {
    values[place + i / kBlockSide * row_entries + i % kBlockSide] += sum[0];
  }
}

// values += the entries of rows first_row and on of the dense product, of which panel holds one for each
// block.
// SASS: none (each entry is read where the selection has it)
template <typename Stored, typename Real, int kBlock>
__global__ void __launch_bounds__(kBlock)
    compact_panel_kernel(const Stored* panel, int64_t columns, int64_t first_row, CsrView csr, Real* values) {
  const Stored* line = panel + int64_t(blockIdx.x) * columns;
  const int64_t row = first_row + blockIdx.x;
  const int64_t end = csr.crow_indices[row + 1];
  for (int64_t entry = csr.crow_indices[row] + threadIdx.x; entry < end; entry += kBlock) {
    values[entry] += widen(line[csr.col_indices[entry]]);
  }
}

}  // namespace partune
