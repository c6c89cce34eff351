// Family block_lora on CUDA. A block reads a tile of a matrix into shared memory once and multiplies it
// there with thin matrices from both sides; or it forms a tile of a product with a thin matrix and adds it to
// memory. 16-bit elements are multiplied by the tensor cores: a float32 number is the sum of two bfloat16
// ones to 2^-17 of its size, so is a float16 one exactly, and of their four products three count. float32 and
// float64 are multiplied as they are.
//
// Bytes moved: as block_lora.h counts them; products of a tile of columns and sums of a block of tokens are
// written and read again, 4·ranks/kLoraTileColumns and 4·ranks/block_tokens per element.
#pragma once
#include "block_lora_tasks.h"
#include "wide.cuh"

namespace partune {

constexpr int kLoraBlock = 256;
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

// ---- elements ----

template <typename Real>
PARTUNE_FN Real thin_element(const ThinMatrix<Real>& thin, int64_t rank, int64_t column) {
  const Real* from = thin.data + rank * thin.rank_stride + column * thin.column_stride;
  Real sum = from[0];
  for (int64_t arm = 1; arm < thin.arms; ++arm) sum += from[arm * thin.arm_stride];
  return multiply(thin.scale, sum);
}

// Dropout's factors of neighbouring elements, a counter drawn once for all that it serves.
template <typename Real>
class LoraDraws {
 public:
  PARTUNE_MEMBER explicit LoraDraws(const LoraMatrix& matrix)
      : dropout_(matrix.dropout), scale_(dropout_scale<Real>(matrix.dropout)) {
    if (!matrix.seed) return;
    const uint64_t seed = uint64_t(*matrix.seed);
    key_ = {uint32_t(seed), uint32_t(seed >> 32)};
    step_ = uint32_t(*matrix.step);
  }

  PARTUNE_MEMBER bool drops() const { return dropout_.dropped != 0; }

  PARTUNE_MEMBER Real factor(int64_t index) {
    const uint64_t counter = uint64_t(index) / kDrawsPerCounter;
    if (counter != counter_) drawn_ = philox(counter, step_, dropout_.layer_id, key_);
    counter_ = counter;
    const int draw = int(index % kDrawsPerCounter);
    const uint32_t low = draw & 2 ? drawn_.word[1] : drawn_.word[0];
    const uint32_t high = draw & 2 ? drawn_.word[3] : drawn_.word[2];
    return is_kept(draw & 4 ? high : low, draw & 1, dropout_) ? scale_ : Real(0);
  }

 private:
  const BlockLoraDropout dropout_;
  const Real scale_;
  PhiloxKey key_ = {};
  uint32_t step_ = 0;
  uint64_t counter_ = ~uint64_t(0);
  PhiloxBlock drawn_ = {};
};

// kPackSize neighbours of a token from `column` on, chunks summed; zeros outside.
template <typename Stored, typename Real>
PARTUNE_FN void read_lora_pack(const LoraMatrix& x, LoraDraws<Real>& draws, int64_t token, int64_t column,
                               Real (&values)[kPackSize<Stored>]) {
  constexpr int kPack = kPackSize<Stored>;
  PARTUNE_UNROLL
  for (int i = 0; i < kPack; ++i) values[i] = Real(0);
  const int64_t count = token < x.tokens ? x.width - column : 0;
  if (count > 0) {
#pragma unroll 1
    for (int64_t chunk = 0; chunk < x.chunks; ++chunk) {
      const int64_t first = (token * x.chunks + chunk) * x.width + column;
      const Stored* from = static_cast<const Stored*>(x.data) + first;
      const WidePack<Stored> pack = load_wide(from, count, is_wide_aligned(from));
      PARTUNE_UNROLL
      for (int i = 0; i < kPack; ++i) {
        Real value = widen(pack.at[i]);
        if (draws.drops() && i < count) value = multiply(value, draws.factor(first + i));
        values[i] += value;
      }
    }
  }
}

// ---- float32 numbers as sums of two bfloat16 ones, in tiles that fragments are read from ----

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
  for (int pair = 0; pair < 8; ++pair) {
    const int half = pair / 4, from = pair % 4;
    const uint32_t rows[2] = {__shfl_sync(0xffffffffu, a[2 * half], row + from),
                              __shfl_sync(0xffffffffu, a[2 * half + 1], row + from)};
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

PARTUNE_FN void add_product(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  multiply_by_shuffles(sums, left, right);
#else
  mma_bf16_16x8x16(sums, left, right, sums);
#endif
}

PARTUNE_FN void multiply_split(const SplitLeft& left, const SplitRight& right, float (&sums)[4]) {
  add_product(sums, left.low, right.high);
  add_product(sums, left.high, right.low);
  add_product(sums, left.high, right.high);
}

// ---- tiles in shared memory, and products of them; each thread calls all of it ----

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

// ---- one reading of a matrix ----

// A block has a tile of columns, a block of tokens, and kGroups times kLoraRanks ranks.
template <typename Stored, typename Real, int kGroups, int kBlock>
struct LoraReader {
  using Multiply = Products<Stored, Real, kBlock>;
  using Shared = typename Multiply::Shared;
  static constexpr int kTokens = Multiply::kTokens, kColumns = Multiply::kColumns;
  const LoraRead<Real>& task;
  Shared& shared;
  int64_t tile, first_column, block, first_rank;

  PARTUNE_MEMBER LoraReader(const LoraRead<Real>& read, Shared& memory) : task(read), shared(memory) {
    const unsigned tiles = unsigned((task.x.width + kColumns - 1) / kColumns);
    tile = blockIdx.x % tiles;
    block = blockIdx.x / tiles;
    first_column = tile * kColumns;
    first_rank = int64_t(blockIdx.z) * kGroups * kLoraRanks;
  }

  PARTUNE_MEMBER void fill_x(int64_t first_token, LoraDraws<Real>& draws) const {
    constexpr int kPack = kPackSize<Stored>, kPacks = kColumns / kPack;
    for (int i = int(threadIdx.x); i < kTokens * kPacks; i += kBlock) {
      const int token = i / kPacks, column = i % kPacks * kPack;
      Real values[kPack];
      read_lora_pack<Stored>(task.x, draws, first_token + token, first_column + column, values);
      PARTUNE_UNROLL
      for (int j = 0; j < kPack; ++j) shared.put_x(token, column + j, values[j]);
    }
  }

  PARTUNE_MEMBER void fill_thin(int64_t rank) const {
    for (int i = int(threadIdx.x); i < kLoraRanks * kColumns; i += kBlock) {
      // Neighbouring threads take what lies side by side in memory.
      const bool by_rank = task.thin.rank_stride == 1;
      const int r = by_rank ? i % kLoraRanks : i / kColumns, c = by_rank ? i / kLoraRanks : i % kColumns;
      const bool exists = rank + r < task.thin.ranks && first_column + c < task.x.width;
      shared.put_thin(r, c, exists ? thin_element(task.thin, rank + r, first_column + c) : Real(0));
    }
  }

  PARTUNE_MEMBER void fill_factors(int64_t first_token, int64_t rank) const {
    for (int i = int(threadIdx.x); i < kLoraRanks * kTokens; i += kBlock) {
      const int token = i / kLoraRanks, r = i % kLoraRanks;
      const bool exists = first_token + token < task.x.tokens && rank + r < task.thin.ranks;
      const int64_t at = (first_token + token) * task.factor_stride + rank + r;
      shared.put_factor(token, r, exists ? task.factors[at] : Real(0));
    }
  }

  PARTUNE_MEMBER void store_products(int64_t first_token, int64_t rank) const {
    Multiply::project(shared, [&](int token, int r, Real value) {
      const int64_t row = tile * task.x.tokens + first_token + token;
      if (first_token + token < task.x.tokens && rank + r < task.thin.ranks)
        task.products[row * task.thin.ranks + rank + r] = value;
    });
  }

  PARTUNE_MEMBER void store_sums(const typename Multiply::Sums& sums, int64_t rank) const {
    Multiply::store_sums(sums, [&](int r, int c, Real value) {
      const int64_t row = block * task.thin.ranks + rank + r;
      if (rank + r < task.thin.ranks && first_column + c < task.x.width)
        task.sums[row * task.x.width + first_column + c] = value;
    });
  }
};

// SASS <float, float>: LDG.E.128
// SASS <BFloat16, float>: LDG.E.128, LDSM
// SASS <BFloat16, float> sm_80+: HMMA
template <typename Stored, typename Real, int kGroups, int kBlock>
__global__ void __launch_bounds__(kBlock) block_lora_read_kernel(LAUNCH_PARAMETER(LoraRead<Real>) task) {
  using Reader = LoraReader<Stored, Real, kGroups, kBlock>;
  using Multiply = typename Reader::Multiply;
  SHARED(typename Reader::Shared, shared, [1]);
  const Reader reader(task, shared[0]);
  typename Multiply::Sums sums[kGroups] = {};
  LoraDraws<Real> draws(task.x);
  const int64_t start = reader.block * task.block_tokens;
  const int64_t stop = start + task.block_tokens < task.x.tokens ? start + task.block_tokens : task.x.tokens;
#pragma unroll 1
  for (int64_t token = start; token < stop; token += Reader::kTokens) {
    __syncthreads();  // the tile before has been read
    reader.fill_x(token, draws);
    PARTUNE_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      const int64_t rank = reader.first_rank + group * kLoraRanks;
      if (group > 0) __syncthreads();
      if (task.products) reader.fill_thin(rank);
      if (task.sums) reader.fill_factors(token, rank);
      __syncthreads();
      if (task.products) reader.store_products(token, rank);
      if (task.sums) Multiply::accumulate(reader.shared, sums[group]);
    }
  }
  if (task.sums) {
    PARTUNE_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      reader.store_sums(sums[group], reader.first_rank + group * kLoraRanks);
    }
  }
}

// ---- a product added to memory ----

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

// A tile's factors and thin matrix for ranks [rank, rank + kLoraRanks).
template <int kBlock, typename Real, typename Shared>
PARTUNE_FN void fill_expansion(const LoraWrite<Real>& task, int64_t first_token, int64_t first_column,
                               int64_t rank, int tokens, int columns, Shared& shared) {
  for (int i = int(threadIdx.x); i < kLoraRanks * tokens; i += kBlock) {
    const int token = i / kLoraRanks, r = i % kLoraRanks;
    const bool exists = first_token + token < task.out.tokens && rank + r < task.thin.ranks;
    const int64_t at = (first_token + token) * task.factor_stride + rank + r;
    shared.put_factor(token, r, exists ? task.factors[at] : Real(0));
  }
  for (int i = int(threadIdx.x); i < kLoraRanks * columns; i += kBlock) {
    const bool by_rank = task.thin.rank_stride == 1;
    const int r = by_rank ? i % kLoraRanks : i / columns, c = by_rank ? i / kLoraRanks : i % columns;
    const bool exists = rank + r < task.thin.ranks && first_column + c < task.out.width;
    shared.put_thin(r, c, exists ? thin_element(task.thin, rank + r, first_column + c) : Real(0));
  }
}

// A pack of sums into each chunk of a token.
template <typename Stored, typename Real>
PARTUNE_FN void write_lora_pack(const LoraWrite<Real>& task, LoraDraws<Real>& draws, int64_t token,
                                int64_t column, const Real* sums) {
  constexpr int kPack = kPackSize<Stored>;
  const LoraMatrix& out = task.out;
  const int64_t count = token < out.tokens ? out.width - column : 0;
  if (count > 0) {
#pragma unroll 1
    for (int64_t chunk = 0; chunk < out.chunks; ++chunk) {
      const int64_t first = (token * out.chunks + chunk) * out.width + column;
      Stored* to = static_cast<Stored*>(out.data) + first;
      const bool aligned = is_wide_aligned(to);
      WidePack<Stored> pack = {};
      if (task.add) pack = load_wide<Stored>(to, count, aligned);
      PARTUNE_UNROLL
      for (int i = 0; i < kPack; ++i) {
        Real value = sums[i];
        if (draws.drops() && i < count) value = multiply(value, draws.factor(first + i));
        if (task.add) value += widen(pack.at[i]);
        round_nearest(value, pack.at[i]);
      }
      store_wide(pack, to, count, aligned);
    }
  }
}

// SASS <float, float>: LDG.E.128, STG.E.128
// SASS <BFloat16, float>: LDG.E.128, STG.E.128, LDSM
// SASS <BFloat16, float> sm_80+: HMMA
template <typename Stored, typename Real, int kBlock>
__global__ void __launch_bounds__(kBlock) block_lora_write_kernel(LAUNCH_PARAMETER(LoraWrite<Real>) task) {
  using Multiply = Expansion<Stored, Real, kBlock>;
  constexpr int kTokens = Multiply::kTokens, kColumns = Multiply::kColumns;
  constexpr int kPack = kPackSize<Stored>, kPacks = kColumns / kPack;
  SHARED(typename Multiply::Shared, shared, [1]);
  SHARED(Real, stage, [kTokens][kColumns + 4]);
  const unsigned tiles = unsigned((task.out.width + kColumns - 1) / kColumns);
  const int64_t first_column = int64_t(blockIdx.x % tiles) * kColumns;
  const int64_t first_token = int64_t(blockIdx.x / tiles) * kTokens;
  typename Multiply::Sums sums = {};
#pragma unroll 1
  for (int64_t rank = 0; rank < task.thin.ranks; rank += kLoraRanks) {
    __syncthreads();  // the ranks before have been read
    fill_expansion<kBlock>(task, first_token, first_column, rank, kTokens, kColumns, shared[0]);
    __syncthreads();
    Multiply::multiply_add_tile(shared[0], sums);
  }
  Multiply::store_sums(sums, [&](int token, int column, Real value) { stage[token][column] = value; });
  __syncthreads();
  LoraDraws<Real> draws(task.out);
#pragma unroll 1
  for (int i = int(threadIdx.x); i < kTokens * kPacks; i += kBlock) {
    const int token = i / kPacks, column = i % kPacks * kPack;
    write_lora_pack<Stored>(task, draws, first_token + token, first_column + column, &stage[token][column]);
  }
}

// ---- parts added up in their order ----

// SASS: none (a thread sums one element, neighbours beside it)
template <typename Real, int kBlock>
__global__ void __launch_bounds__(kBlock) block_lora_sum_kernel(const LoraSum<Real> task) {
  const int64_t size = task.rows * task.columns, element = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  if (element < size) {
    Real sum = Real(0);
    for (int64_t part = 0; part < task.parts; ++part) sum += task.partial[part * task.part_stride + element];
    Real* to =
        task.out + element / task.columns * task.row_stride + element % task.columns * task.column_stride;
    for (int64_t arm = 0; arm < task.arms; ++arm) to[arm * task.arm_stride] = multiply(task.scale, sum);
  }
}

}  // namespace partune
