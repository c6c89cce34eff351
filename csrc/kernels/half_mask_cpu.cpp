// Rows are stepped where they are. The live entries of a strip of elements are moved together in the L1
// cache, stepped there and moved back; so are those of columns, by their offsets. A strip is short enough
// that arithmetic overlaps the neighbours' waits for memory.
#include "half_mask_cpu.h"

#include "adamw_tile_cpu.h"
#include "compress_cpu.h"

namespace partune {
namespace PARTUNE_ISA {
namespace {

constexpr int kTile = kHalfTile;
constexpr int kStrip = 256;
constexpr int64_t kShortRow = 32;  // entries: shorter runs are gathered

// The mask's words of one tile, entries from `count` on as frozen.
void draw_words(int64_t tile, int64_t count, uint32_t mask_id, PhiloxKey key,
                uint32_t (&words)[kHalfTileWords]) {
  constexpr int kCounters = kHalfTile / kCounterEntries;
  uint64_t lane_numbers[kWords];
  for (int i = 0; i < kWords; ++i) lane_numbers[i] = uint64_t(i);
  const Words first = load_words(lane_numbers) + uint64_t(tile) * kCounters;
  for (int counter = 0; counter < kCounters; counter += kWords) {
    const PhiloxWords drawn = philox(first + uint64_t(counter), kMaskDraw, mask_id, key);
    for (int word = 0; word < 4; ++word) {
      uint32_t low[kWords];
      store_low_halves(drawn.word[word], low);
      for (int lane = 0; lane < kWords; ++lane) words[(counter + lane) * 4 + word] = low[lane];
    }
  }
  const int64_t left = count - tile * kHalfTile;
  if (left >= kHalfTile) return;
  for (int i = 0; i < kHalfTileWords; ++i) words[i] = first_bits(words[i], left - 32 * int64_t(i));
}

void read_words(const uint32_t* mask, int64_t tile, int64_t count, uint32_t (&words)[kHalfTileWords]) {
  const int64_t left = count - tile * kHalfTile;
  for (int i = 0; i < kHalfTileWords; ++i) {
    words[i] =
        32 * int64_t(i) < left ? first_bits(mask[tile * kHalfTileWords + i], left - 32 * int64_t(i)) : 0;
  }
}

// Where the entries of a tile are: in the matrix (row·columns + column), and in memory.
struct Offsets {
  int64_t index[kTile + kWords], weight[kTile], grad[kTile];
};

// Asks for cache lines that are needed soon, in the L2 cache.
template <typename Stored>
void request(const Stored* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(Stored))) __builtin_prefetch(from + i, 0, 2);
}

template <typename Weight, typename Grad, typename State, typename Real>
class HalfStepper {
 public:
  HalfStepper(const HalfMatrix& m, const SparseAdamWStep& s, PhiloxKey mask_key)
      : m_(m), at_(m.entries), mask_key_(mask_key), flat_(lies_flat(m.entries)), stepper_(m.entries, s) {}

  void run(int64_t first, int64_t last) {
    if (m_.level == kHalfElements) {
      for (int64_t tile = first; tile < last; ++tile) step_elements(tile);
      return;
    }
    const int64_t end = last * kTile < at_.nnz ? last * kTile : at_.nnz;
    const bool runs = m_.level == kHalfRows && at_.columns >= kShortRow && at_.weight_column_stride == 1 &&
                      at_.grad_column_stride == 1;
    if (runs) {
      step_rows(first * kTile, end);
    } else {
      for (int64_t begin = first * kTile; begin < end; begin += kTile) {
        const int count = int(end - begin < kTile ? end - begin : kTile);
        locate(begin, count);
        step_offsets(begin, count);
      }
    }
  }

 private:
  Weight* weight() const { return static_cast<Weight*>(at_.weight); }
  Grad* grad() const { return static_cast<Grad*>(const_cast<void*>(at_.grad)); }

  // Entries [begin, end) of the live rows, each of which lies side by side. The machine's own prefetcher
  // runs on into frozen rows: a live one behind them is asked for two rows ahead.
  void step_rows(int64_t begin, int64_t end) {
    int64_t slot = begin / at_.columns, column = begin % at_.columns;
    while (begin < end) {
      int64_t count = at_.columns - column < end - begin ? at_.columns - column : end - begin;
      if (count > kStrip) count = kStrip;
      const int64_t row = m_.live[slot];
      if (slot + 2 < m_.live_count && m_.live[slot + 2] != m_.live[slot + 1] + 1) {
        const int64_t ahead = m_.live[slot + 2];
        request(weight() + ahead * at_.weight_row_stride + column, count);
        request(grad() + ahead * at_.grad_row_stride + column, count);
      }
      if (stepper_.draws()) {
        for (int64_t i = 0; i < count; ++i) offsets_.index[i] = row * at_.columns + column + i;
      }
      stepper_.step(begin, int(count), weight() + row * at_.weight_row_stride + column,
                    grad() + row * at_.grad_row_stride + column, offsets_.index);
      begin += count;
      column += count;
      if (column == at_.columns) {
        column = 0;
        ++slot;
      }
    }
  }

  void put(int i, int64_t row, int64_t column) {
    offsets_.index[i] = row * at_.columns + column;
    offsets_.weight[i] = row * at_.weight_row_stride + column * at_.weight_column_stride;
    offsets_.grad[i] = row * at_.grad_row_stride + column * at_.grad_column_stride;
  }

  // Live rows or columns: entries [begin, begin + count) in the state's order.
  void locate(int64_t begin, int count) {
    const bool by_row = m_.level == kHalfRows;
    const int64_t width = by_row ? at_.columns : m_.live_count;
    int64_t slot = begin / width, within = begin % width;
    for (int i = 0; i < count; ++i) {
      by_row ? put(i, m_.live[slot], within) : put(i, slot, m_.live[within]);
      if (++within == width) {
        within = 0;
        ++slot;
      }
    }
  }

  // Entries whose offsets are listed.
  void step_offsets(int64_t position, int count) {
    for (int done = 0; done < count; done += kStrip) {
      const int here = count - done < kStrip ? count - done : kStrip;
      if (!stepper_.has_master()) {
        for (int i = 0; i < here; ++i) weights_[i] = weight()[offsets_.weight[done + i]];
      }
      for (int i = 0; i < here; ++i) grads_[i] = grad()[offsets_.grad[done + i]];
      stepper_.step(position + done, here, weights_, grads_, offsets_.index + done);
      scatter(weights_, offsets_.weight + done, here, weight());
    }
  }

  void step_elements(int64_t tile) {
    const int64_t all = entries_of(at_), first = tile * kTile;
    const int entries = int(all - first < kTile ? all - first : kTile);
    uint32_t words[kHalfTileWords];
    if (m_.mask) {
      read_words(m_.mask, tile, all, words);
    } else {
      draw_words(tile, all, m_.mask_id, mask_key_, words);
    }
    if (!flat_ || stepper_.draws()) list_elements(first, entries, words);
    if (flat_) {
      step_flat(m_.ranks[tile], first, entries, words);
    } else {
      step_offsets(m_.ranks[tile], int(m_.ranks[tile + 1] - m_.ranks[tile]));
    }
  }

  // Entries that lie as their mask does.
  void step_flat(int64_t position, int64_t first, int entries, const uint32_t* words) {
    for (int done = 0, listed = 0; done < entries; done += kStrip) {
      const int here = entries - done < kStrip ? entries - done : kStrip;
      Weight* const strip = weight() + first + done;
      request_page(strip, here);
      request_page(grad() + first + done, here);
      const int count = compress(grad() + first + done, words + done / 32, here, grads_);
      if (!stepper_.has_master()) compress(strip, words + done / 32, here, weights_);
      stepper_.step(position + listed, count, weights_, grads_, offsets_.index + listed);
      expand(weights_, words + done / 32, here, strip);
      listed += count;
    }
  }

  void list_elements(int64_t first, int entries, const uint32_t* words) {
    int live = 0;
    if (flat_) {
      for (int i = 0; i < entries; ++i) {
        offsets_.index[live] = first + i;
        live += int(words[i / 32] >> i % 32 & 1u);
      }
      return;
    }
    int64_t row = first / at_.columns, column = first % at_.columns;
    for (int i = 0; i < entries; ++i) {
      if (words[i / 32] >> i % 32 & 1u) put(live++, row, column);
      if (++column == at_.columns) {
        column = 0;
        ++row;
      }
    }
  }

  const HalfMatrix& m_;
  const SparseAdamWMatrix& at_;
  const PhiloxKey mask_key_;
  const bool flat_;
  TileStepper<Weight, Grad, State, Real, kStrip> stepper_;
  Offsets offsets_;
  Weight weights_[kStrip + kCompressSlack];
  Grad grads_[kStrip + kCompressSlack];
};

template <typename Weight, typename Grad, typename State, typename Real>
void step(const HalfMatrix& m, const SparseAdamWStep& s, PhiloxKey mask_key, int64_t first, int64_t last) {
  HalfStepper<Weight, Grad, State, Real>(m, s, mask_key).run(first, last);
}

void draw_mask(int64_t first, int64_t last, int64_t count, uint32_t mask_id, PhiloxKey mask_key,
               uint32_t* mask) {
  const int64_t all_words = (count + kCounterEntries - 1) / kCounterEntries * (kCounterEntries / 32);
  for (int64_t tile = first; tile < last; ++tile) {
    uint32_t words[kHalfTileWords];
    draw_words(tile, count, mask_id, mask_key, words);
    for (int64_t i = 0; i < kHalfTileWords && tile * kHalfTileWords + i < all_words; ++i) {
      mask[tile * kHalfTileWords + i] = words[i];
    }
  }
}

void count_mask(const uint32_t* mask, int64_t first, int64_t last, int64_t count, int64_t* counts) {
  for (int64_t tile = first; tile < last; ++tile) {
    uint32_t words[kHalfTileWords];
    read_words(mask, tile, count, words);
    counts[tile] = 0;
    for (uint32_t word : words) counts[tile] += count_bits(word);
  }
}

}  // namespace

const HalfMaskCpu half_mask_cpu = {
    {
        step<double, double, double, double>,
        step<float, float, float, float>,
        step<float, float, BFloat16, float>,
        step<BFloat16, BFloat16, float, float>,
        step<BFloat16, BFloat16, BFloat16, float>,
        step<BFloat16, float, float, float>,
        step<BFloat16, float, BFloat16, float>,
        step<Half, Half, float, float>,
        step<Half, Half, BFloat16, float>,
        step<Half, float, float, float>,
        step<Half, float, BFloat16, float>,
    },
    draw_mask,
    count_mask,
};

}  // namespace PARTUNE_ISA
}  // namespace partune
