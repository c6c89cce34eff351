// Family block_lora on CUDA. A block reads a tile of a matrix into shared memory once and multiplies it
// there with thin matrices from both sides; or it forms a tile of a product with a thin matrix and adds it to
// memory.
//
// Bytes moved: as block_lora.h counts them; products of a tile of columns and sums of a block of tokens are
// written and read again, 4·ranks/kLoraTileColumns and 4·ranks/block_tokens per element.
#pragma once
#include "block_lora_tasks.h"
#include "split_tile.cuh"
#include "thin_products.cuh"
#include "wide.cuh"

namespace partune {

constexpr int kLoraBlock = 256;

// ---- elements ----

template <typename Real>
PARTUNE_FN Real thin_element(const ThinMatrix<Real>& thin, int64_t rank, int64_t column) {
  const int64_t at = thin.transposed ? column * thin.ranks + rank : rank * thin.width + column;
  Real sum = thin.data[at];
#pragma unroll 2
  for (int64_t arm = 1; arm < thin.arms; ++arm) sum += thin.data[arm * thin.ranks * thin.width + at];
  return multiply(thin.scale, sum);
}

// kLoraRanks ranks of kColumns columns; zeros outside.
template <int kBlock, int kColumns, typename Real, typename Shared>
PARTUNE_FN void fill_thin(const ThinMatrix<Real>& thin, int64_t first_rank, int64_t first_column,
                          Shared& shared) {
  for (int i = int(threadIdx.x); i < kLoraRanks * kColumns; i += kBlock) {
    // Neighbouring threads take what lies side by side in memory.
    const int r = thin.transposed ? i % kLoraRanks : i / kColumns;
    const int c = thin.transposed ? i / kLoraRanks : i % kColumns;
    const bool exists = first_rank + r < thin.ranks && first_column + c < thin.width;
    shared.put_thin(r, c, exists ? thin_element(thin, first_rank + r, first_column + c) : Real(0));
  }
}

// kLoraRanks ranks of kTokens tokens; zeros outside.
template <int kBlock, int kTokens, typename Real, typename Shared>
PARTUNE_FN void fill_factors(const LoraFactors<Real>& factors, int64_t first_token, int64_t first_rank,
                             Shared& shared) {
  for (int i = int(threadIdx.x); i < kLoraRanks * kTokens; i += kBlock) {
    const int token = i / kLoraRanks, r = i % kLoraRanks;
    const bool exists = first_token + token < factors.tokens && first_rank + r < factors.ranks;
    const int64_t at = (first_token + token) * factors.stride + first_rank + r;
    shared.put_factor(token, r, exists ? factors.data[at] : Real(0));
  }
}

// Dropout of neighbouring elements.
template <typename Real, bool kDropout>
class LoraDraws {
 public:
  PARTUNE_MEMBER explicit LoraDraws(const LoraMatrix& matrix)
      : dropout_(matrix.dropout), scale_(dropout_scale<Real>(matrix.dropout)) {
    if constexpr (kDropout) {
      const uint64_t seed = uint64_t(*matrix.seed);
      key_ = {uint32_t(seed), uint32_t(seed >> 32)};
      step_ = uint32_t(*matrix.step);
    }
  }

  // Multiplies the values, the first of which is element `first`, by their factors.
  template <int kPack>
  PARTUNE_MEMBER void apply(int64_t first, Real (&values)[kPack]) const {
    if constexpr (kDropout) {
      const uint32_t bits = kept<kPack>(first);
      PARTUNE_UNROLL
      for (int i = 0; i < kPack; ++i) values[i] = multiply(values[i], bits >> i & 1u ? scale_ : Real(0));
    }
  }

 private:
  // Which of the kPack elements from `first` on are kept, as bits.
  template <int kPack>
  PARTUNE_MEMBER uint32_t kept(int64_t first) const {
    constexpr int kLast = kPack - 1;
    const int skipped = int(first % kDrawsPerCounter);
    const uint64_t counter = uint64_t(first) / kDrawsPerCounter;
    uint32_t bits = 0;
#pragma unroll 1
    for (int begin = 0; begin <= skipped + kLast; begin += kDrawsPerCounter)
      bits |= draw(counter + uint64_t(begin / kDrawsPerCounter)) << begin;
    return bits >> skipped;
  }

  PARTUNE_MEMBER uint32_t draw(uint64_t counter) const {
    const PhiloxBlock drawn = philox(counter, step_, dropout_.layer_id, key_);
    uint32_t bits = 0;
    PARTUNE_UNROLL
    for (int word = 0; word < 4; ++word) {
      bits |= uint32_t((drawn.word[word] & 0xffffu) >= dropout_.dropped) << (2 * word);
      bits |= uint32_t(drawn.word[word] >> 16 >= dropout_.dropped) << (2 * word + 1);
    }
    return bits;
  }

  const BlockLoraDropout dropout_;
  const Real scale_;
  PhiloxKey key_ = {};
  uint32_t step_ = 0;
};

// kPackSize neighbours of a token from `column` on, chunks summed; zeros outside.
template <typename Stored, typename Real, bool kDropout>
PARTUNE_FN void read_lora_pack(const LoraMatrix& x, const LoraDraws<Real, kDropout>& draws, int64_t token,
                               int64_t column, Real (&sums)[kPackSize<Stored>]) {
  constexpr int kPack = kPackSize<Stored>;
  PARTUNE_UNROLL
  for (int i = 0; i < kPack; ++i) sums[i] = Real(0);
  const int64_t count = token < x.tokens ? x.width - column : 0;
#pragma unroll 1
  for (int64_t chunk = 0; chunk < x.chunks; ++chunk) {
    const int64_t first = (token * x.chunks + chunk) * x.width + column;
    const Stored* from = static_cast<const Stored*>(x.data) + first;
    const WidePack<Stored> pack = load_wide(from, count, is_wide_aligned(from));
    Real values[kPack];
    PARTUNE_UNROLL
    for (int i = 0; i < kPack; ++i) values[i] = widen(pack.at[i]);
    draws.apply(first, values);
    PARTUNE_UNROLL
    for (int i = 0; i < kPack; ++i) sums[i] += values[i];
  }
}

// ---- one reading of a matrix ----

// A block has a tile of columns, a block of tokens, and kLoraRanks ranks.
template <typename Stored, typename Real, int kBlock>
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
    first_rank = int64_t(blockIdx.z) * kLoraRanks;
  }

  template <bool kDropout>
  PARTUNE_MEMBER void fill_x(int64_t first_token, const LoraDraws<Real, kDropout>& draws) const {
    constexpr int kPack = kPackSize<Stored>, kPacks = kColumns / kPack;
    for (int i = int(threadIdx.x); i < kTokens * kPacks; i += kBlock) {
      const int token = i / kPacks, column = i % kPacks * kPack;
      Real values[kPack];
      read_lora_pack<Stored>(task.x, draws, first_token + token, first_column + column, values);
      PARTUNE_UNROLL
      for (int j = 0; j < kPack; ++j) shared.put_x(token, column + j, values[j]);
    }
  }

  PARTUNE_MEMBER void store_products(int64_t first_token) const {
    Multiply::project(shared, [&](int token, int r, Real value) {
      const int64_t row = tile * task.x.tokens + first_token + token;
      if (first_token + token < task.x.tokens && first_rank + r < task.thin.ranks)
        task.products[row * task.thin.ranks + first_rank + r] = value;
    });
  }

  PARTUNE_MEMBER void store_sums(const typename Multiply::Sums& sums) const {
    Multiply::store_sums(sums, [&](int r, int c, Real value) {
      const int64_t row = block * task.thin.ranks + first_rank + r;
      if (first_rank + r < task.thin.ranks && first_column + c < task.x.width)
        task.sums[row * task.x.width + first_column + c] = value;
    });
  }
};

// SASS <float, float>: LDG.E.128
// SASS <BFloat16, float>: LDG.E.128, LDSM
// SASS <BFloat16, float> sm_80+: HMMA
template <typename Stored, typename Real, bool kProducts, bool kSums, bool kDropout, int kBlock>
__global__ void __launch_bounds__(kBlock) block_lora_read_kernel(LAUNCH_PARAMETER(LoraRead<Real>) task) {
  using Reader = LoraReader<Stored, Real, kBlock>;
  using Multiply = typename Reader::Multiply;
  SHARED(typename Reader::Shared, shared, [1]);
  const Reader reader(task, shared[0]);
  typename Multiply::Sums sums = {};
  const LoraDraws<Real, kDropout> draws(task.x);
  if constexpr (kProducts)
    fill_thin<kBlock, Reader::kColumns>(task.thin, reader.first_rank, reader.first_column, shared[0]);
  const int64_t start = reader.block * task.block_tokens;
  const int64_t stop = smaller(start + task.block_tokens, task.x.tokens);
#pragma unroll 1
  for (int64_t token = start; token < stop; token += Reader::kTokens) {
    __syncthreads();  // the tile before has been read
    reader.fill_x(token, draws);
    if constexpr (kSums)
      fill_factors<kBlock, Reader::kTokens>(task.factors, token, reader.first_rank, shared[0]);
    __syncthreads();
    if constexpr (kProducts) reader.store_products(token);
    if constexpr (kSums) Multiply::accumulate(shared[0], sums);
  }
  if constexpr (kSums) reader.store_sums(sums);
}

// ---- a product added to memory ----

// A pack of sums into each chunk of a token.
template <typename Stored, typename Real, bool kDropout>
PARTUNE_FN void write_lora_pack(const LoraWrite<Real>& task, const LoraDraws<Real, kDropout>& draws,
                                int64_t token, int64_t column, const Real* sums) {
  constexpr int kPack = kPackSize<Stored>;
  const LoraMatrix& out = task.out;
  const int64_t count = token < out.tokens ? out.width - column : 0;
  WidePack<Stored> nothing;  // what may be added to any number, to a negative zero too
  PARTUNE_UNROLL
  for (int i = 0; i < kPack; ++i) round_nearest(-Real(0), nothing.at[i]);
#pragma unroll 1
  for (int64_t chunk = 0; chunk < out.chunks; ++chunk) {
    const int64_t first = (token * out.chunks + chunk) * out.width + column;
    Stored* to = static_cast<Stored*>(out.data) + first;
    const bool aligned = is_wide_aligned(to);
    WidePack<Stored> pack = nothing;
    if (task.add) pack = load_wide<Stored>(to, count, aligned);
    Real values[kPack];
    PARTUNE_UNROLL
    for (int i = 0; i < kPack; ++i) values[i] = sums[i];
    draws.apply(first, values);
    PARTUNE_UNROLL
    for (int i = 0; i < kPack; ++i) round_nearest(values[i] + widen(pack.at[i]), pack.at[i]);
    store_wide(pack, to, count, aligned);
  }
}

// SASS <float, float>: LDG.E.128, STG.E.128
// SASS <BFloat16, float>: LDG.E.128, STG.E.128, LDSM
// SASS <BFloat16, float> sm_80+: HMMA
template <typename Stored, typename Real, bool kDropout, int kBlock>
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
    fill_factors<kBlock, kTokens>(task.factors, first_token, rank, shared[0]);
    fill_thin<kBlock, kColumns>(task.thin, rank, first_column, shared[0]);
    __syncthreads();
    Multiply::multiply_add_tile(shared[0], sums);
  }
  Multiply::store_sums(sums, [&](int token, int column, Real value) { stage[token][column] = value; });
  __syncthreads();
  const LoraDraws<Real, kDropout> draws(task.out);
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
