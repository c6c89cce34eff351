// Products of float32 numbers by the tensor cores' bfloat16: a number is the sum of two, to 2^-18 of its
// size, and a product that of four. The two lie in tiles of shared memory.
#pragma once
#include "kit.cuh"

namespace partune {

// Rows are padded: eight rows' 16 bytes lie in different banks.
template <int kRows, int kColumns>
struct alignas(16) SplitTile {
  uint16_t high[kRows][kColumns + 8], low[kRows][kColumns + 8];

  PARTUNE_MEMBER void put(int row, int column, float value) {
    BFloat16 whole, rest;
    round_nearest(value, whole);
    const bool finite = (whole.bits & 0x7f80u) != 0x7f80u;
    round_nearest(finite ? value - widen(whole) : 0.0f, rest);
    high[row][column] = whole.bits;
    low[row][column] = rest.bits;
  }
};

struct SplitLeft {
  uint32_t high[4], low[4];
};
struct SplitRight {
  uint32_t high[2], low[2];
};

// [16, 16] of a tile whose rows are the product's.
template <int kRows, int kColumns>
PARTUNE_FN void load_left(const SplitTile<kRows, kColumns>& tile, int row, int column, SplitLeft& left) {
  const int lane = int(threadIdx.x % 32), matrix = lane / 8;
  const int i = row + matrix % 2 * 8 + lane % 8, j = column + matrix / 2 * 8;
  ldmatrix_x4(left.high, &tile.high[i][j]);
  ldmatrix_x4(left.low, &tile.low[i][j]);
}

// [16, 8] of a tile whose rows are the product's columns.
template <int kRows, int kColumns>
PARTUNE_FN void load_right(const SplitTile<kRows, kColumns>& tile, int row, int column, SplitRight& right) {
  const int lane = int(threadIdx.x % 32), i = row + lane / 4, j = column + lane % 4 * 2;
  PARTUNE_UNROLL
  for (int half = 0; half < 2; ++half) {
    right.high[half] = *reinterpret_cast<const uint32_t*>(&tile.high[i][j + 8 * half]);
    right.low[half] = *reinterpret_cast<const uint32_t*>(&tile.low[i][j + 8 * half]);
  }
}

// The same of a tile whose columns are the product's.
template <int kRows, int kColumns>
PARTUNE_FN void load_right_across(const SplitTile<kRows, kColumns>& tile, int row, int column,
                                  SplitRight& right) {
  const int lane = int(threadIdx.x % 32), i = row + lane % 4 * 2, j = column + lane / 4;
  PARTUNE_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int k = i + 8 * half;
    right.high[half] = uint32_t(tile.high[k][j]) | uint32_t(tile.high[k + 1][j]) << 16;
    right.low[half] = uint32_t(tile.low[k][j]) | uint32_t(tile.low[k + 1][j]) << 16;
  }
}

// mma_bf16_16x8x16 with c = d, as a GPU before sm_80 can do it: right, not fast.
PARTUNE_FN void multiply_by_shuffles(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const int lane = int(threadIdx.x % 32), row = lane / 4 * 4, column = lane % 4 * 8;
  PARTUNE_UNROLL
  for (int half = 0; half < 2; ++half) {
#pragma unroll 1
    for (int from = 0; from < 4; ++from) {
      const uint32_t rows[2] = {__shfl_sync(0xffffffffu, half ? a[2] : a[0], row + from),
                                __shfl_sync(0xffffffffu, half ? a[3] : a[1], row + from)};
      const uint32_t columns[2] = {__shfl_sync(0xffffffffu, b[half], column + from),
                                   __shfl_sync(0xffffffffu, b[half], column + 4 + from)};
      PARTUNE_UNROLL
      for (int i = 0; i < 4; ++i) {
        const uint32_t left = rows[i / 2], right = columns[i % 2];
        d[i] = multiply_add(float_from_bits(left << 16), float_from_bits(right << 16), d[i]);
        d[i] = multiply_add(float_from_bits(left & 0xffff0000u), float_from_bits(right & 0xffff0000u), d[i]);
      }
    }
  }
}

PARTUNE_FN void add_product(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2]) {
  if (has_bf16_mma()) {
    mma_bf16_16x8x16(sums, left, right, sums);
  } else {
    multiply_by_shuffles(sums, left, right);
  }
}

PARTUNE_FN void multiply_split(const SplitLeft& left, const SplitRight& right, float (&sums)[4]) {
  add_product(sums, left.low, right.low);
  add_product(sums, left.low, right.high);
  add_product(sums, left.high, right.low);
  add_product(sums, left.high, right.high);
}

}  // namespace partune
