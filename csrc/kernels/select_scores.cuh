// Where the scores of family select come from on CUDA: a tile of them is read from memory or formed as
// a product of factors, whose every entry is the same chain of fused multiply-adds each time; or they
// are random.
//
// Bytes moved: as select.h counts them.
#pragma once
#include "kit.cuh"
#include "select.h"

namespace partune {

// A tile and how threads share it: a half-warp has whole rows, a thread eight entries of each of its.
constexpr int kSelectBlock = 128;
constexpr int kTileColumns = 128;
constexpr int kRowThreads = 16;
constexpr int kRowStep = kSelectBlock / kRowThreads;
template <typename Score>
constexpr int kThreadRows = 32 / int(sizeof(Score));  // a tile fills half of the registers
template <typename Score>
constexpr int kTileRows = kThreadRows<Score> * kRowStep;

// A thread's part of a tile: rows `row`, `row + kRowStep`, …; columns `column` to `column + 3`, and those 64
// further on.
template <typename Score>
struct ScoreTile {
  int64_t row, column;
  Score at[kThreadRows<Score>][2][4];
};

template <typename Score>
PARTUNE_FN ScoreTile<Score> place_tile(int64_t tile, int64_t tile_columns) {
  ScoreTile<Score> result;
  result.row = tile / tile_columns * kTileRows<Score> + threadIdx.x / kRowThreads;
  result.column = tile % tile_columns * kTileColumns + int64_t(threadIdx.x % kRowThreads) * 4;
  return result;
}

// ---- a source's fill(tile) loads or computes a thread's part ----

template <typename Stored, typename Real>
struct StoredScores {
  using Score = Real;
  const Stored* scores;  // [rows, columns]
  int64_t rows, columns;

  PARTUNE_MEMBER void fill(ScoreTile<Score>& tile) const {
    const bool aligned = is_aligned(scores) && columns % 4 == 0;
    PARTUNE_UNROLL
    for (int i = 0; i < kThreadRows<Score>; ++i) {
      const int64_t row = tile.row + i * kRowStep;
      PARTUNE_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int64_t column = tile.column + half * (kTileColumns / 2);
        const int64_t count = row < rows ? columns - column : 0;
        const Pack4<Stored> pack = load_pack(scores + row * columns + column, count, aligned);
        PARTUNE_UNROLL
        for (int j = 0; j < 4; ++j) tile.at[i][half][j] = widen(pack.at[j]);
      }
    }
  }
};

// |left @ right|. Both operands pass through shared memory a slice of the rank at a time; the next
// slice is on its way while this one is used.
template <typename Real>
struct FactorScores {
  using Score = Real;
  static constexpr int kVector = 16 / int(sizeof(Real));
  static constexpr int kDepth = 4 * kVector;
  struct alignas(32) Slice {
    Real left[kTileRows<Real>][kDepth];
    Real right[kDepth][kTileColumns];
  };
  struct alignas(16) Vector {
    Real at[kVector];
  };

  const Real* left;   // [rows, rank]
  const Real* right;  // [rank, columns]
  int64_t rows, columns, rank;

  // Copies to[i][j] = from[i·stride + j], zeros where i or j is out of range.
  template <int kRows, int kColumns>
  static PARTUNE_MEMBER void copy_slice(Real (&to)[kRows][kColumns], const Real* from, int64_t stride,
                                        int64_t valid_rows, int64_t valid_columns) {
    const bool aligned = reinterpret_cast<uintptr_t>(from) % 16 == 0 && stride % kVector == 0;
    if (aligned) {
      constexpr int kVectors = kColumns / kVector;
      for (int i = int(threadIdx.x); i < kRows * kVectors; i += kSelectBlock) {
        const int row = i / kVectors, column = i % kVectors * kVector;
        const bool valid = row < valid_rows && column < valid_columns;
        cp_async<16>(&to[row][column], valid ? from + row * stride + column : from, valid);
      }
    } else {
      for (int i = int(threadIdx.x); i < kRows * kColumns; i += kSelectBlock) {
        const int row = i / kColumns, column = i % kColumns;
        const bool valid = row < valid_rows && column < valid_columns;
        cp_async<int(sizeof(Real))>(&to[row][column], valid ? from + row * stride + column : from, valid);
      }
    }
  }

  PARTUNE_MEMBER void copy_slices(Slice& slice, int64_t tile_row, int64_t tile_column, int64_t depth) const {
    copy_slice(slice.left, left + tile_row * rank + depth, rank, rows - tile_row, rank - depth);
    copy_slice(slice.right, right + depth * columns + tile_column, columns, rank - depth,
               columns - tile_column);
  }

  static PARTUNE_MEMBER void multiply_slices(const Slice& slice, ScoreTile<Score>& tile) {
    const int row = int(threadIdx.x) / kRowThreads, column = int(threadIdx.x) % kRowThreads * 4;
    PARTUNE_UNROLL
    for (int depth = 0; depth < kDepth; depth += kVector) {
      Vector a[kThreadRows<Score>];
      PARTUNE_UNROLL
      for (int i = 0; i < kThreadRows<Score>; ++i) {
        a[i] = *reinterpret_cast<const Vector*>(&slice.left[row + i * kRowStep][depth]);
      }
      PARTUNE_UNROLL
      for (int d = 0; d < kVector; ++d) {
        PARTUNE_UNROLL
        for (int half = 0; half < 2; ++half) {
          const Pack4<Real> b = *reinterpret_cast<const Pack4<Real>*>(
              &slice.right[depth + d][column + half * (kTileColumns / 2)]);
          PARTUNE_UNROLL
          for (int i = 0; i < kThreadRows<Score>; ++i) {
            PARTUNE_UNROLL
            for (int j = 0; j < 4; ++j) {
              tile.at[i][half][j] = multiply_add(a[i].at[d], b.at[j], tile.at[i][half][j]);
            }
          }
        }
      }
    }
  }

  PARTUNE_MEMBER void fill(ScoreTile<Score>& tile) const {
    SHARED(Slice, slices, [2]);
    const int64_t tile_row = tile.row - threadIdx.x / kRowThreads;
    const int64_t tile_column = tile.column - threadIdx.x % kRowThreads * 4;
    PARTUNE_UNROLL
    for (int i = 0; i < kThreadRows<Score> * 8; ++i) tile.at[i / 8][i / 4 % 2][i % 4] = 0;
    copy_slices(slices[0], tile_row, tile_column, 0);
    cp_async_commit();
    int current = 0;
    for (int64_t depth = 0; depth < rank; depth += kDepth) {
      if (depth + kDepth < rank) copy_slices(slices[1 - current], tile_row, tile_column, depth + kDepth);
      cp_async_commit();
      cp_async_wait<1>();
      __syncthreads();
      multiply_slices(slices[current], tile);
      __syncthreads();
      current = 1 - current;
    }
    PARTUNE_UNROLL
    for (int i = 0; i < kThreadRows<Score> * 8; ++i) {
      Real& score = tile.at[i / 8][i / 4 % 2][i % 4];
      score = score < 0 ? -score : score;
    }
  }
};

// ---- random scores ----

// SASS: STG.E.128
template <int kBlock>
__global__ void __launch_bounds__(kBlock)
    random_scores_kernel(float* scores, int64_t count, const int64_t* seed, const int64_t* step,
                         uint32_t parameter_id) {
  const int64_t first = (int64_t(blockIdx.x) * kBlock + threadIdx.x) * 4;
  const PhiloxKey key{uint32_t(uint64_t(*seed)), uint32_t(uint64_t(*seed) >> 32)};
  Pack4<float> pack;
  PARTUNE_UNROLL
  for (int i = 0; i < 4; ++i) {
    pack.at[i] = uniform_from_bits(philox(uint64_t(first + i), uint32_t(*step), parameter_id, key).word[0]);
  }
  store_pack(pack, scores + first, count - first, is_aligned(scores));
}

}  // namespace partune
