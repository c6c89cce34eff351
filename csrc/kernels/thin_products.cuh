// Products with thin matrices of tiles in shared memory, which a block's threads form together: of 16-bit
// elements by the tensor cores, a bfloat16 element being exact as one bfloat16 number and a float16 one as
// the sum of two; of float32 and float64 by plain multiply-adds.
#pragma once
#include "split_tile.cuh"

namespace partune {

constexpr int kLoraRanks = 16;  // multiplied at a time
constexpr int kLoraTileTokens = 64;
constexpr int kLoraTileColumns = 128;

template <typename Stored>
struct LoraTile {
  static constexpr bool kTensor = sizeof(Stored) == 2;
  static constexpr int kTokens = sizeof(Stored) == 8 ? kLoraTileTokens / 2 : kLoraTileTokens;
  static constexpr int kColumns = sizeof(Stored) == 8 ? kLoraTileColumns / 2 : kLoraTileColumns;
  static constexpr int kOutColumns = 64;  // of a tile that is written
};

// ---- products of a tile of [tokens, columns] with thin matrices from both sides ----

// By the tensor cores.
template <typename Stored, typename Real, int kBlock>
struct TensorProducts {
  static constexpr int kTokens = LoraTile<Stored>::kTokens, kColumns = LoraTile<Stored>::kColumns;
  static constexpr int kWarps = kBlock / 32;
  static constexpr int kWarpColumns = kColumns / kWarps / 8;  // tiles of 8 columns of a warp
  static_assert(kTokens == 64 && kWarps == 8, "four warps by rows, two of them side by side");
  using Sums = float[kWarpColumns][4];

  struct Shared {
    SplitTile<kTokens, kColumns> x;
    SplitTile<kLoraRanks, kColumns> thin;
    SplitTile<kLoraRanks, kTokens> factors;
    PARTUNE_MEMBER void put_x(int token, int column, float value) { x.put(token, column, value); }
    PARTUNE_MEMBER void put_thin(int rank, int column, float value) { thin.put(rank, column, value); }
    PARTUNE_MEMBER void put_factor(int token, int rank, float value) { factors.put(rank, token, value); }
  };

  // store(token, rank, x·thinᵀ).
  template <typename Store>
  static PARTUNE_MEMBER void project(const Shared& shared, const Store& store) {
    const int warp = int(threadIdx.x / 32), lane = int(threadIdx.x % 32);
    const int token = warp % 4 * 16, rank = warp / 4 * 8;
    float sums[4] = {};
    PARTUNE_UNROLL
    for (int k = 0; k < kColumns; k += 16) {
      SplitLeft left;
      SplitRight right;
      load_left(shared.x, token, k, left);
      load_right(shared.thin, rank, k, right);
      multiply_split(left, right, sums);
    }
    PARTUNE_UNROLL
    for (int i = 0; i < 4; ++i) store(token + lane / 4 + i / 2 * 8, rank + lane % 4 * 2 + i % 2, sums[i]);
  }

  // sums += factorsᵀ·x.
  static PARTUNE_MEMBER void accumulate(const Shared& shared, Sums& sums) {
    const int column = int(threadIdx.x / 32) * kWarpColumns * 8;
    PARTUNE_UNROLL
    for (int k = 0; k < kTokens; k += 16) {
      SplitLeft left;
      load_left(shared.factors, 0, k, left);
      PARTUNE_UNROLL
      for (int tile = 0; tile < kWarpColumns; ++tile) {
        SplitRight right;
        load_right_across(shared.x, k, column + tile * 8, right);
        multiply_split(left, right, sums[tile]);
      }
    }
  }

  // store(rank, column, sum).
  template <typename Store>
  static PARTUNE_MEMBER void store_sums(const Sums& sums, const Store& store) {
    const int lane = int(threadIdx.x % 32), column = int(threadIdx.x / 32) * kWarpColumns * 8;
    PARTUNE_UNROLL
    for (int tile = 0; tile < kWarpColumns; ++tile) {
      PARTUNE_UNROLL
      for (int i = 0; i < 4; ++i) {
        store(lane / 4 + i / 2 * 8, column + tile * 8 + lane % 4 * 2 + i % 2, sums[tile][i]);
      }
    }
  }
};

// By plain multiply-adds.
template <typename Stored, typename Real, int kBlock>
struct PlainProducts {
  static constexpr int kTokens = LoraTile<Stored>::kTokens, kColumns = LoraTile<Stored>::kColumns;
  static constexpr int kPad = 16 / int(sizeof(Real));
  static constexpr int kTokenRanks = kLoraRanks * kTokens / kBlock;          // of a thread, one token
  static constexpr int kColumnRanks = kLoraRanks * kColumns / (4 * kBlock);  // of a thread, four columns
  using Sums = Real[kColumnRanks][4];

  struct alignas(32) Shared {
    Real x[kTokens][kColumns + kPad];
    Real thin[kLoraRanks][kColumns + kPad];
    Real factors[kTokens][kLoraRanks];
    PARTUNE_MEMBER void put_x(int token, int column, Real value) { x[token][column] = value; }
    PARTUNE_MEMBER void put_thin(int rank, int column, Real value) { thin[rank][column] = value; }
    PARTUNE_MEMBER void put_factor(int token, int rank, Real value) { factors[token][rank] = value; }
  };

  template <typename Store>
  static PARTUNE_MEMBER void project(const Shared& shared, const Store& store) {
    constexpr int kThreads = kLoraRanks / kTokenRanks;  // of a token
    const int token = int(threadIdx.x) / kThreads, rank = int(threadIdx.x) % kThreads * kTokenRanks;
    Real sums[kTokenRanks] = {};
#pragma unroll 4
    for (int k = 0; k < kColumns; ++k) {
      PARTUNE_UNROLL
      for (int i = 0; i < kTokenRanks; ++i) {
        sums[i] = multiply_add(shared.x[token][k], shared.thin[rank + i][k], sums[i]);
      }
    }
    PARTUNE_UNROLL
    for (int i = 0; i < kTokenRanks; ++i) store(token, rank + i, sums[i]);
  }

  static PARTUNE_MEMBER void accumulate(const Shared& shared, Sums& sums) {
    const int column = first_column(), rank = first_rank();
#pragma unroll 4
    for (int k = 0; k < kTokens; ++k) {
      PARTUNE_UNROLL
      for (int i = 0; i < kColumnRanks; ++i) {
        PARTUNE_UNROLL
        for (int j = 0; j < 4; ++j) {
          sums[i][j] = multiply_add(shared.factors[k][rank + i], shared.x[k][column + j], sums[i][j]);
        }
      }
    }
  }

  template <typename Store>
  static PARTUNE_MEMBER void store_sums(const Sums& sums, const Store& store) {
    PARTUNE_UNROLL
    for (int i = 0; i < kColumnRanks; ++i) {
      PARTUNE_UNROLL
      for (int j = 0; j < 4; ++j) store(first_rank() + i, first_column() + j, sums[i][j]);
    }
  }

 private:
  static PARTUNE_MEMBER int first_column() { return int(threadIdx.x) % (kColumns / 4) * 4; }
  static PARTUNE_MEMBER int first_rank() { return int(threadIdx.x) / (kColumns / 4) * kColumnRanks; }
};

template <bool kTensor, typename Stored, typename Real, int kBlock>
struct ChooseProducts {
  using Type = TensorProducts<Stored, Real, kBlock>;
};
template <typename Stored, typename Real, int kBlock>
struct ChooseProducts<false, Stored, Real, kBlock> {
  using Type = PlainProducts<Stored, Real, kBlock>;
};
template <typename Stored, typename Real, int kBlock>
using Products = typename ChooseProducts<LoraTile<Stored>::kTensor, Stored, Real, kBlock>::Type;

// ---- a tile as the product of factors and a thin matrix ----

// By the tensor cores.
template <typename Stored, typename Real, int kBlock>
struct TensorExpansion {
  static constexpr int kTokens = LoraTile<Stored>::kTokens, kColumns = LoraTile<Stored>::kOutColumns;
  static constexpr int kTiles = kColumns / 16;  // of 8 columns, of a warp
  static_assert(kTokens == 64 && kBlock == 256, "four warps by rows, two of them side by side");
  using Sums = float[kTiles][4];

  struct Shared {
    SplitTile<kTokens, kLoraRanks> factors;
    SplitTile<kColumns, kLoraRanks> thin;
    PARTUNE_MEMBER void put_factor(int token, int rank, float value) { factors.put(token, rank, value); }
    PARTUNE_MEMBER void put_thin(int rank, int column, float value) { thin.put(column, rank, value); }
  };

  static PARTUNE_MEMBER void multiply_add_tile(const Shared& shared, Sums& sums) {
    const int warp = int(threadIdx.x / 32);
    SplitLeft left;
    load_left(shared.factors, warp % 4 * 16, 0, left);
    PARTUNE_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      SplitRight right;
      load_right(shared.thin, (warp / 4 * kTiles + tile) * 8, 0, right);
      multiply_split(left, right, sums[tile]);
    }
  }

  // store(token, column, sum).
  template <typename Store>
  static PARTUNE_MEMBER void store_sums(const Sums& sums, const Store& store) {
    const int warp = int(threadIdx.x / 32), lane = int(threadIdx.x % 32);
    PARTUNE_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      PARTUNE_UNROLL
      for (int i = 0; i < 4; ++i) {
        store(warp % 4 * 16 + lane / 4 + i / 2 * 8, (warp / 4 * kTiles + tile) * 8 + lane % 4 * 2 + i % 2,
              sums[tile][i]);
      }
    }
  }
};

// By plain multiply-adds.
template <typename Stored, typename Real, int kBlock>
struct PlainExpansion {
  static constexpr int kTokens = LoraTile<Stored>::kTokens, kColumns = LoraTile<Stored>::kOutColumns;
  static constexpr int kThreadTokens = kTokens * kColumns / (4 * kBlock);  // of a thread, four columns
  using Sums = Real[kThreadTokens][4];

  struct alignas(32) Shared {
    Real factors[kTokens][kLoraRanks];
    Real thin[kLoraRanks][kColumns];
    PARTUNE_MEMBER void put_factor(int token, int rank, Real value) { factors[token][rank] = value; }
    PARTUNE_MEMBER void put_thin(int rank, int column, Real value) { thin[rank][column] = value; }
  };

  static PARTUNE_MEMBER void multiply_add_tile(const Shared& shared, Sums& sums) {
#pragma unroll 4
    for (int rank = 0; rank < kLoraRanks; ++rank) {
      PARTUNE_UNROLL
      for (int i = 0; i < kThreadTokens; ++i) {
        PARTUNE_UNROLL
        for (int j = 0; j < 4; ++j) {
          sums[i][j] = multiply_add(shared.factors[first_token() + i][rank],
                                    shared.thin[rank][first_column() + j], sums[i][j]);
        }
      }
    }
  }

  template <typename Store>
  static PARTUNE_MEMBER void store_sums(const Sums& sums, const Store& store) {
    PARTUNE_UNROLL
    for (int i = 0; i < kThreadTokens; ++i) {
      PARTUNE_UNROLL
      for (int j = 0; j < 4; ++j) store(first_token() + i, first_column() + j, sums[i][j]);
    }
  }

 private:
  static PARTUNE_MEMBER int first_column() { return int(threadIdx.x) % (kColumns / 4) * 4; }
  static PARTUNE_MEMBER int first_token() { return int(threadIdx.x) / (kColumns / 4) * kThreadTokens; }
};

template <bool kTensor, typename Stored, typename Real, int kBlock>
struct ChooseExpansion {
  using Type = TensorExpansion<Stored, Real, kBlock>;
};
template <typename Stored, typename Real, int kBlock>
struct ChooseExpansion<false, Stored, Real, kBlock> {
  using Type = PlainExpansion<Stored, Real, kBlock>;
};
template <typename Stored, typename Real, int kBlock>
using Expansion = typename ChooseExpansion<LoraTile<Stored>::kTensor, Stored, Real, kBlock>::Type;

}  // namespace partune
