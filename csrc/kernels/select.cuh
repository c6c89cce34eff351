// Family select on CUDA: radix selection. A block takes a tile of scores from select_scores.cuh; three
// kinds of pass count, and one writes:
//   histogram and narrow, for each digit of the keys: the key of the k-th best score, exactly;
//   count and two scans: where the entries of each tile's rows begin in the CSR;
//   emit: the CSR's columns.
// Each pass forms a factors' tile again; all see the same bits, and the CPU's.
//
// Bytes moved: as select.h counts them; counters add 8 per 128 entries and pass.
#pragma once
#include "select_scores.cuh"

namespace partune {

constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;

// One digit of a key: bits [shift, shift + bits).
struct Digit {
  int shift, bits;
  bool highest;
};

// The k-th best key as far as its digits are known, and how many of those still equal to it are wanted.
template <typename Key>
struct SelectState {
  Key threshold;
  int64_t wanted;
};

// Where a kernel learns of the threshold: on the device, or from its caller.
template <typename Key>
struct SelectBound {
  const SelectState<Key>* found;  // null: given
  SelectState<Key> given;
};

template <typename Key>
PARTUNE_FN SelectState<Key> read_bound(const SelectBound<Key>& bound) {
  return bound.found ? *bound.found : bound.given;
}

// How many entries are above the threshold and how many equal it: in one row of one tile, then in all
// tiles to its left.
struct TileCount {
  uint32_t above, equal;
};

// The same for all rows above: of a row alone at first.
struct RowStart {
  int64_t above, equal;
};

template <typename Source>
using KeyFrom = typename KeyOf<typename Source::Score>::Type;

template <typename Source>
PARTUNE_FN int64_t tile_columns_of(const Source& source) {
  return (source.columns + kTileColumns - 1) / kTileColumns;
}

// ---- the k-th best key ----

// bins[digit of key] += 1 for each score whose higher digits are those known so far.
// SASS <StoredScores<float, float>>: LDG.E.128 x16
// SASS <FactorScores<float>>: LDS.128 x32
// SASS <FactorScores<float>> sm_80+: LDGSTS.E.BYPASS.128 x2
template <typename Source, int kBlock>
__global__ void __launch_bounds__(kBlock)
    select_histogram_kernel(const Source source, int64_t tiles, const Digit digit, bool largest,
                            const SelectState<KeyFrom<Source>>* state, unsigned long long* bins) {
  using Key = KeyFrom<Source>;
  SHARED(uint32_t, counts, [kBins]);
  for (int bin = int(threadIdx.x); bin < kBins; bin += kBlock) counts[bin] = 0;
  __syncthreads();
  const Key known = digit.highest ? 0 : state->threshold;
  const int64_t tile_columns = tile_columns_of(source);
  for (int64_t number = blockIdx.x; number < tiles; number += gridDim.x) {
    ScoreTile<typename Source::Score> tile = place_tile<typename Source::Score>(number, tile_columns);
    source.fill(tile);
    PARTUNE_UNROLL
    for (int i = 0; i < kThreadRows<typename Source::Score>; ++i) {
      const bool row_valid = tile.row + i * kRowStep < source.rows;
      PARTUNE_UNROLL
      for (int j = 0; j < 8; ++j) {
        const bool valid = row_valid && tile.column + j / 4 * (kTileColumns / 2) + j % 4 < source.columns;
        const Key key = score_key(tile.at[i][j / 4][j % 4], largest);
        const bool inside = digit.highest || (key ^ known) >> (digit.shift + digit.bits) == 0;
        if (valid && inside) atomicAdd(&counts[key >> digit.shift & ((1u << digit.bits) - 1)], 1u);
      }
    }
  }
  __syncthreads();
  for (int bin = int(threadIdx.x); bin < kBins; bin += kBlock) {
    if (counts[bin] != 0) atomicAdd(&bins[bin], static_cast<unsigned long long>(counts[bin]));
  }
}

// The sum over lower threads of the block, and over all of it.
template <typename T, int kBlock>
PARTUNE_FN void block_scan(T value, T& before, T& total) {
  SHARED(T, warp_sums, [kBlock / 32]);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  T inclusive = value;
  PARTUNE_UNROLL
  for (int step = 1; step < 32; step *= 2) {
    const T lower = __shfl_up_sync(0xffffffffu, inclusive, unsigned(step));
    if (lane >= step) inclusive += lower;
  }
  if (lane == 31) warp_sums[warp] = inclusive;
  __syncthreads();
  before = inclusive - value;
  total = 0;
  PARTUNE_UNROLL
  for (int i = 0; i < kBlock / 32; ++i) {
    if (i < warp) before += warp_sums[i];
    total += warp_sums[i];
  }
  __syncthreads();
}

// Finds the digit of the k-th best key among the bins, from the best down, and empties them.
// SASS: none (one block, eight counts a thread)
template <typename Key, int kBlock>
__global__ void __launch_bounds__(kBlock)
    select_narrow_kernel(const Digit digit, int64_t k, SelectState<Key>* state, unsigned long long* bins) {
  constexpr int kThreadBins = kBins / kBlock;
  static_assert(kThreadBins <= 2, "a digit has an even number of values: a thread has all its bins or none");
  const Key known = digit.highest ? 0 : state->threshold;
  const int64_t wanted = digit.highest ? k : state->wanted;
  const int best = (1 << digit.bits) - 1 - int(threadIdx.x) * kThreadBins;
  int64_t counts[kThreadBins] = {}, sum = 0;
  PARTUNE_UNROLL
  for (int i = 0; i < kThreadBins; ++i) {
    if (best >= 0) {
      counts[i] = int64_t(bins[best - i]);
      bins[best - i] = 0;
    }
    sum += counts[i];
  }
  int64_t better, total;
  block_scan<int64_t, kBlock>(sum, better, total);
  // Nothing wanted: the best digit, of which nobody is taken.
  if (wanted == 0 && threadIdx.x == 0) *state = {Key(known | Key(best) << digit.shift), 0};
  PARTUNE_UNROLL
  for (int i = 0; i < kThreadBins; ++i) {
    const int64_t rest = wanted - better;  // to be taken of this bin and of worse ones
    if (rest > 0 && rest <= counts[i]) *state = {Key(known | Key(best - i) << digit.shift), rest};
    better += counts[i];
  }
}

// ---- where entries go ----

// A row's flags among a thread's eight entries: bit j is entry j % 4 of half j / 4.
struct RowFlags {
  uint32_t above, equal;
};

template <typename Source>
PARTUNE_FN RowFlags compare_row(const Source& source, const ScoreTile<typename Source::Score>& tile, int i,
                                KeyFrom<Source> threshold, bool largest) {
  RowFlags flags = {};
  const bool row_valid = tile.row + i * kRowStep < source.rows;
  PARTUNE_UNROLL
  for (int j = 0; j < 8; ++j) {
    const bool valid = row_valid && tile.column + j / 4 * (kTileColumns / 2) + j % 4 < source.columns;
    const KeyFrom<Source> key = score_key(tile.at[i][j / 4][j % 4], largest);
    if (valid && key > threshold) flags.above |= 1u << j;
    if (valid && key == threshold) flags.equal |= 1u << j;
  }
  return flags;
}

// Four counts of at most 64 in one word: above and equal, in the left half of a tile and in the right.
PARTUNE_FN uint32_t pack_counts(RowFlags flags) {
  return uint32_t(__popc(flags.above & 0xfu)) | uint32_t(__popc(flags.above >> 4)) << 8 |
         uint32_t(__popc(flags.equal & 0xfu)) << 16 | uint32_t(__popc(flags.equal >> 4)) << 24;
}
PARTUNE_FN uint32_t above_left(uint32_t counts) { return counts & 0xffu; }
PARTUNE_FN uint32_t above_right(uint32_t counts) { return counts >> 8 & 0xffu; }
PARTUNE_FN uint32_t equal_left(uint32_t counts) { return counts >> 16 & 0xffu; }
PARTUNE_FN uint32_t equal_right(uint32_t counts) { return counts >> 24; }

// SASS <StoredScores<float, float>>: LDG.E.128 x16
// SASS <FactorScores<float>>: LDS.128 x32
// SASS <FactorScores<float>> sm_80+: LDGSTS.E.BYPASS.128 x2
template <typename Source, int kBlock>
__global__ void __launch_bounds__(kBlock)
    select_count_kernel(const Source source, const SelectBound<KeyFrom<Source>> bound, bool largest,
                        TileCount* tile_counts) {
  const int64_t tile_columns = tile_columns_of(source);
  ScoreTile<typename Source::Score> tile =
      place_tile<typename Source::Score>(int64_t(blockIdx.x), tile_columns);
  source.fill(tile);
  const KeyFrom<Source> threshold = read_bound(bound).threshold;
  PARTUNE_UNROLL
  for (int i = 0; i < kThreadRows<typename Source::Score>; ++i) {
    uint32_t counts = pack_counts(compare_row(source, tile, i, threshold, largest));
    PARTUNE_UNROLL
    for (int step = 1; step < kRowThreads; step *= 2) {
      counts += __shfl_xor_sync(0xffffffffu, counts, step, kRowThreads);
    }
    const int64_t row = tile.row + i * kRowStep;
    if (threadIdx.x % kRowThreads == 0 && row < source.rows) {
      tile_counts[row * tile_columns + int64_t(blockIdx.x) % tile_columns] = {
          above_left(counts) + above_right(counts), equal_left(counts) + equal_right(counts)};
    }
  }
}

// Within each row, counts become those of the tiles to the left; row_starts gets those to the left of
// the row's end. A warp takes a row.
// SASS: none (eight bytes a lane, neighbours beside each other)
template <int kBlock>
__global__ void __launch_bounds__(kBlock)
    select_scan_row_kernel(TileCount* tile_counts, RowStart* row_starts, int64_t rows, int64_t tile_columns) {
  const int lane = int(threadIdx.x) % 32;
  const int64_t row = int64_t(blockIdx.x) * (kBlock / 32) + threadIdx.x / 32;
  TileCount* counts = tile_counts + row * tile_columns;
  uint32_t above_before = 0, equal_before = 0;
  for (int64_t first = 0; first <= tile_columns; first += 32) {
    const int64_t column = first + lane;
    const bool valid = row < rows && column < tile_columns;
    const TileCount own = valid ? counts[column] : TileCount{0, 0};
    TileCount inclusive = own;
    PARTUNE_UNROLL
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t above = __shfl_up_sync(0xffffffffu, inclusive.above, unsigned(step));
      const uint32_t equal = __shfl_up_sync(0xffffffffu, inclusive.equal, unsigned(step));
      if (lane >= step) {
        inclusive.above += above;
        inclusive.equal += equal;
      }
    }
    const TileCount before = {above_before + inclusive.above - own.above,
                              equal_before + inclusive.equal - own.equal};
    if (valid) counts[column] = before;
    if (row < rows && column == tile_columns) row_starts[row] = {before.above, before.equal};
    above_before += __shfl_sync(0xffffffffu, inclusive.above, 31);
    equal_before += __shfl_sync(0xffffffffu, inclusive.equal, 31);
  }
}

// row_starts become those of all rows above, and crow_indices follow, which has the end of the last row
// too. Equal entries are taken in order, so those taken before a place are min(equal ones before it,
// wanted). One block.
// SASS: none (one block, neighbours beside each other)
template <typename Key, int kBlock>
__global__ void __launch_bounds__(kBlock) select_scan_kernel(RowStart* row_starts, int64_t* crow_indices,
                                                             int64_t rows, const SelectBound<Key> bound) {
  const int64_t wanted = read_bound(bound).wanted;
  int64_t above_before = 0, equal_before = 0;
  for (int64_t first = 0; first <= rows; first += kBlock) {
    const int64_t row = first + threadIdx.x;
    const RowStart own = row < rows ? row_starts[row] : RowStart{0, 0};
    int64_t above, equal, above_total, equal_total;
    block_scan<int64_t, kBlock>(own.above, above, above_total);
    block_scan<int64_t, kBlock>(own.equal, equal, equal_total);
    above += above_before;
    equal += equal_before;
    if (row < rows) row_starts[row] = {above, equal};
    if (row <= rows) crow_indices[row] = above + (equal < wanted ? equal : wanted);
    above_before += above_total;
    equal_before += equal_total;
  }
}

// SASS <StoredScores<float, float>>: LDG.E.128 x16
// SASS <FactorScores<float>>: LDS.128 x32
// SASS <FactorScores<float>> sm_80+: LDGSTS.E.BYPASS.128 x2
template <typename Source, int kBlock>
__global__ void __launch_bounds__(kBlock)
    select_emit_kernel(const Source source, const SelectBound<KeyFrom<Source>> bound, bool largest,
                       const TileCount* tile_counts, const RowStart* row_starts, int32_t* col_indices) {
  const int64_t tile_columns = tile_columns_of(source);
  ScoreTile<typename Source::Score> tile =
      place_tile<typename Source::Score>(int64_t(blockIdx.x), tile_columns);
  source.fill(tile);
  const SelectState<KeyFrom<Source>> state = read_bound(bound);
  PARTUNE_UNROLL
  for (int i = 0; i < kThreadRows<typename Source::Score>; ++i) {
    const RowFlags flags = compare_row(source, tile, i, state.threshold, largest);
    const uint32_t own = pack_counts(flags);
    uint32_t inclusive = own;
    PARTUNE_UNROLL
    for (int step = 1; step < kRowThreads; step *= 2) {
      const uint32_t lower = __shfl_up_sync(0xffffffffu, inclusive, unsigned(step), kRowThreads);
      if (int(threadIdx.x) % kRowThreads >= step) inclusive += lower;
    }
    const uint32_t row_total = __shfl_sync(0xffffffffu, inclusive, kRowThreads - 1, kRowThreads);
    const uint32_t before = inclusive - own;
    const int64_t row = tile.row + i * kRowStep;
    if ((flags.above | flags.equal) != 0) {
      const RowStart start = row_starts[row];
      const TileCount left = tile_counts[row * tile_columns + int64_t(blockIdx.x) % tile_columns];
      PARTUNE_UNROLL
      for (int half = 0; half < 2; ++half) {
        int64_t above = start.above + left.above +
                        (half == 0 ? above_left(before) : above_left(row_total) + above_right(before));
        int64_t equal = start.equal + left.equal +
                        (half == 0 ? equal_left(before) : equal_left(row_total) + equal_right(before));
        PARTUNE_UNROLL
        for (int j = 0; j < 4; ++j) {
          const bool is_above = flags.above >> (half * 4 + j) & 1u;
          const bool is_equal = flags.equal >> (half * 4 + j) & 1u;
          if (is_above || (is_equal && equal < state.wanted)) {
            const int64_t position = above + (equal < state.wanted ? equal : state.wanted);
            col_indices[position] = int32_t(tile.column + half * (kTileColumns / 2) + j);
          }
          above += is_above;
          equal += is_equal;
        }
      }
    }
  }
}

}  // namespace partune
