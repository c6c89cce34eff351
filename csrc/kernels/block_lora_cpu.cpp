// A body takes a tile of tokens through all columns, a block of columns at a time. An input that is dropped
// from, or summed over its chunks, is written down so and stays in the L2 cache for the products that need
// it; what needs nothing of that is read where it is, and widened on load.
#include "block_lora_cpu.h"

#include "philox_cpu.h"
#include "thin_products_cpu.h"

namespace partune {
namespace PARTUNE_ISA {
namespace {

template <typename Real>
void set_zero(Real* numbers, int64_t count) {
  __builtin_memset(numbers, 0, uint64_t(count) * sizeof(Real));
}

// Which elements of the input are kept.
class DropoutDraws {
 public:
  static constexpr int kBatch = kWords * kDrawsPerCounter;

  template <typename Real>
  explicit DropoutDraws(const BlockLoraTask<Real>& task)
      : dropout_(task.dropout), step_(task.step), key_(task.key) {}

  // Of elements [first, first + count): all bits of what is kept, none of others. They are written to `kept`,
  // in whole batches, and begin where that is said to.
  const int16_t* draw(int64_t first, int64_t count, int16_t* kept) const {
    const int64_t begin = first / kDrawsPerCounter, skipped = first % kDrawsPerCounter;
    uint64_t lanes[kWords];
    for (int i = 0; i < kWords; ++i) lanes[i] = uint64_t(begin + i);
    Words index = load_words(lanes);
    for (int64_t done = 0; done < skipped + count; done += kBatch, index = index + uint64_t(kWords)) {
      draw_batch(index, kept + done);
    }
    return kept + skipped;
  }

 private:
  typedef uint16_t Draws __attribute__((vector_size(kVectorBytes)));

  // The halves of the counters' words, in order.
  void draw_batch(Words index, int16_t* kept) const {
    const PhiloxWords drawn = philox(index, step_, dropout_.layer_id, key_);
    const Words low = (drawn.word[0] & 0xffffffffu) | drawn.word[1] << 32;
    const Words high = (drawn.word[2] & 0xffffffffu) | drawn.word[3] << 32;
    uint64_t halves[2 * kWords];
    for (int64_t i = 0; i < kWords; ++i) {
      halves[2 * i] = low[i];
      halves[2 * i + 1] = high[i];
    }
    for (int64_t i = 0; i < 2; ++i) {
      Draws draws;
      __builtin_memcpy(&draws, halves + i * kWords, sizeof draws);
      const auto chosen = draws >= uint16_t(dropout_.dropped);
      __builtin_memcpy(kept + i * kBatch / 2, &chosen, sizeof chosen);
    }
  }

  const BlockLoraDropout dropout_;
  const uint32_t step_;
  const PhiloxKey key_;
};

// Factors of elements: 0, or the scale of what is kept.
template <typename Real>
class DropoutFactors {
 public:
  explicit DropoutFactors(Real scale) : scale_((Bits)repeat(scale)) {}

  PARTUNE_MEMBER Vector<Real> of(const int16_t* kept) const {
#if defined(__AVX512F__)
    if constexpr (sizeof(Real) == 4) {
      const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kept));
      return (Vector<Real>)(scale_ & (Bits)_mm512_maskz_cvtepi16_epi32(__mmask16(0xffff), halves));
    }
#endif
    typedef int16_t Narrow __attribute__((vector_size(kLanes<Real> * 2)));
    Narrow narrow;
    __builtin_memcpy(&narrow, kept, sizeof narrow);
    return (Vector<Real>)(scale_ & (Bits) __builtin_convertvector(narrow, Signed));
  }

 private:
  using Bits = typename BitsOf<int(sizeof(Real))>::Type;
  typedef decltype(Bits{} < Bits{}) Signed;
  const Bits scale_;
};

// How products that are rounded to the stored type may multiply, where the task has pairs: nothing, or Pairs.
template <typename Stored>
struct PairsOf {
  using Type = void;
};
template <typename Stored>
constexpr bool kPairs = false;
#if defined(__AVX512BF16__)
template <>
struct PairsOf<BFloat16> {
  using Type = Pairs;
};
template <>
constexpr bool kPairs<BFloat16> = true;
#endif

template <typename Stored, typename Real>
class Tile {
 public:
  explicit Tile(const BlockLoraTask<Real>& task)
      : task_(task), shape_(task.shape), draws_(task), factors_(dropout_scale<Real>(task.dropout)) {}

  // Tokens [first, first + tokens), forward.
  void forward(int64_t first, int64_t tokens) {
    Real* hidden = task_.hidden + first * shape_.ranks;
    set_zero(hidden, tokens * shape_.ranks);
    for (int64_t column = 0; column < shape_.width; column += kLoraColumns) {
      const int64_t columns = smaller(shape_.width - column, kLoraColumns), next = column + kLoraColumns;
      ReadAhead ahead = next < shape_.width ? input_ahead(first, next) : member_ahead(0, first, 0);
      ahead.spread(project_steps<Real>(tokens, shape_.ranks, columns));
      with_input(first, tokens, column, columns, [&](auto input) {
        project(input, tokens, Rows<const Real>{task_.down + column, task_.down_pitch}, shape_.ranks, columns,
                Rows<Real>{hidden, shape_.ranks}, ahead);
      });
    }
    for (int64_t i = 0; i < task_.member_count; ++i) {
      const BlockLoraMember<Real>& m = task_.members[i];
      Stored* output = static_cast<Stored*>(m.output) + first * m.out;
      const Factors factors = factors_of(hidden + m.first, tokens, m.rank, m.up_pairs);
      for (int64_t column = 0; column < m.out; column += kLoraColumns) {
        const int64_t columns = smaller(m.out - column, kLoraColumns);
        ReadAhead ahead = ahead_of_member(i, first, column);
        if (ahead.is_empty()) ahead = input_ahead(first + tokens, 0);
        expand_by<Stored>(factors, tokens, {(m.up_pairs ? m.up_pairs : m.up) + column, m.pitch}, columns,
                          {{output + column, m.out}, 1, 0, true}, ahead);
      }
    }
  }

  // The same backward; `partial` is its block's, grad_hidden its tokens' part of that.
  void backward(int64_t first, int64_t tokens, Real* grad_hidden, Real* partial) {
    set_zero(grad_hidden, tokens * shape_.ranks);
    for (int64_t i = 0; i < task_.member_count; ++i) read_gradient(i, first, tokens, grad_hidden, partial);
    if (!task_.down_grad && !task_.grad_input) return;
    const Factors factors = factors_of(grad_hidden, tokens, shape_.ranks, task_.down_pairs);
    for (int64_t column = 0; column < shape_.width; column += kLoraColumns) {
      const int64_t columns = smaller(shape_.width - column, kLoraColumns), next = column + kLoraColumns;
      if (task_.down_grad) {
        ReadAhead ahead = task_.grad_input ? grad_ahead(first, column) : input_ahead(first, next);
        ahead.spread(accumulate_steps<Real>(tokens, shape_.ranks, columns));
        with_input(first, tokens, column, columns, [&](auto input) {
          accumulate(Rows<const Real>{grad_hidden, shape_.ranks}, input, tokens, shape_.ranks, columns,
                     Rows<Real>{partial + column, task_.down_pitch}, ahead);
        });
      }
      if (task_.grad_input) {
        ReadAhead ahead = task_.down_grad ? input_ahead(first, next) : grad_ahead(first, next);
        if (ahead.is_empty()) ahead = member_ahead(0, first + tokens, 0);
        write_input_grad(first, tokens, column, columns, factors, ahead);
      }
    }
  }

 private:
  // A tile's factors of a thin matrix, one by one or in pairs.
  struct Factors {
    Rows<const Real> rows;
    int64_t count;
    bool paired;
  };

  Factors factors_of(const Real* first, int64_t tokens, int64_t ranks, const Real* thin_pairs) {
    if constexpr (kPairs<Stored>) {
      if (thin_pairs) {
        for (int64_t i = 0; i < tokens; ++i) {
          PairsOf<Stored>::Type::of_neighbours(first + i * shape_.ranks, ranks, factor_pairs_[i]);
        }
        return {{factor_pairs_[0], kMostPairedRanks / 2}, quotient_up(ranks, 2), true};
      }
    }
    return {{first, shape_.ranks}, ranks, false};
  }

  template <typename Out>
  void expand_by(const Factors& factors, int64_t tokens, Rows<const Real> thin, int64_t columns,
                 const Chunks<Out>& out, ReadAhead& ahead) const {
    ahead.spread(expand_steps<Real>(tokens, factors.count, columns));
    if constexpr (kPairs<Stored>) {
      if (factors.paired) {
        expand<Out, Real, typename PairsOf<Stored>::Type>(factors.rows, tokens, thin, factors.count, columns,
                                                          out, ahead);
        return;
      }
    }
    expand<Out, Real>(factors.rows, tokens, thin, factors.count, columns, out, ahead);
  }

  // What is read next: a tile's columns from `column` on, or nothing.
  ReadAhead features_ahead(const void* matrix, int64_t first, int64_t column) const {
    if (!matrix || first >= shape_.tokens || column >= shape_.width) return {};
    return {static_cast<const Stored*>(matrix) + first * shape_.features + column,
            smaller(shape_.tokens - first, kLoraTile),
            shape_.features,
            smaller(shape_.width - column, kLoraColumns),
            shape_.chunks,
            shape_.width};
  }
  ReadAhead input_ahead(int64_t first, int64_t column) const {
    return features_ahead(task_.input, first, column);
  }
  ReadAhead grad_ahead(int64_t first, int64_t column) const {
    return features_ahead(task_.grad_input, first, column);
  }
  ReadAhead member_ahead(int64_t member, int64_t first, int64_t column) const {
    if (member >= task_.member_count || first >= shape_.tokens) return {};
    const BlockLoraMember<Real>& m = task_.members[member];
    return {static_cast<const Stored*>(m.output) + first * m.out + column,
            smaller(shape_.tokens - first, kLoraTile),
            m.out,
            smaller(m.out - column, kLoraColumns),
            1,
            0};
  }
  // After columns of a member.
  ReadAhead ahead_of_member(int64_t member, int64_t first, int64_t column) const {
    const bool more = column + kLoraColumns < task_.members[member].out;
    return more ? member_ahead(member, first, column + kLoraColumns) : member_ahead(member + 1, first, 0);
  }

  // hidden's gradient, and the sums of grad up.
  void read_gradient(int64_t member, int64_t first, int64_t tokens, Real* grad_hidden, Real* partial) {
    const BlockLoraMember<Real>& m = task_.members[member];
    const Stored* grad = static_cast<const Stored*>(m.output) + first * m.out;
    const Real* hidden = task_.hidden + first * shape_.ranks + m.first;
    const bool inner = task_.down_grad || task_.grad_input;
    for (int64_t column = 0; column < m.out; column += kLoraColumns) {
      const int64_t columns = smaller(m.out - column, kLoraColumns);
      const Rows<const Stored> read{grad + column, m.out};
      ReadAhead ahead = ahead_of_member(member, first, column);
      if (ahead.is_empty()) {
        ahead = task_.down_grad    ? input_ahead(first, 0)
                : task_.grad_input ? grad_ahead(first, 0)
                                   : member_ahead(0, first + tokens, 0);
      }
      ahead.spread((inner ? project_steps<Real>(tokens, m.rank, columns) : 0) +
                   (task_.up_grad ? accumulate_steps<Real>(tokens, m.rank, columns) : 0));
      if (inner) {
        project(read, tokens, Rows<const Real>{m.up + column, m.pitch}, m.rank, columns,
                Rows<Real>{grad_hidden + m.first, shape_.ranks}, ahead);
      }
      if (task_.up_grad) {
        accumulate(Rows<const Real>{hidden, shape_.ranks}, read, tokens, m.rank, columns,
                   Rows<Real>{partial + m.partial + column, m.pitch}, ahead);
      }
    }
  }

  // body(rows) with what the down-projections read of columns [column, column + columns).
  template <typename Body>
  void with_input(int64_t first, int64_t tokens, int64_t column, int64_t columns, const Body& body) {
    const Stored* input = static_cast<const Stored*>(task_.input) + first * shape_.features + column;
    if (shape_.chunks == 1 && task_.dropout.dropped == 0) {
      body(Rows<const Stored>{input, shape_.features});
      return;
    }
    for (int64_t token = 0; token < tokens; ++token) {
      for (int64_t chunk = 0; chunk < shape_.chunks; ++chunk) {
        const int64_t offset = token * shape_.features + chunk * shape_.width;
        const int16_t* kept = draw(token, chunk, first * shape_.features + column + offset, columns, false);
        if (chunk == 0) {
          add_chunk<false>(input + offset, kept, columns, kept_[token]);
        } else {
          add_chunk<true>(input + offset, kept, columns, kept_[token]);
        }
      }
    }
    body(Rows<const Real>{kept_[0], kKept});
  }

  // to = (add ? to : 0) + factors·from; null: nothing is dropped.
  template <bool kAdd>
  void add_chunk(const Stored* from, const int16_t* kept, int64_t columns, Real* to) const {
    for (int64_t i = 0; i < columns; i += kLanes<Real>) {
      Vector<Real> read = widen_first<Real>(from + i, columns - i);
      if (kept) read = read * factors_.of(kept + i);
      if (kAdd) read = read + load_vector(to + i);
      store_vector(read, to + i);
    }
  }

  // What is kept of a tile's token and chunk, from element `index` on; null: nothing is dropped. `again`:
  // they were the last that were drawn for this token and chunk.
  const int16_t* draw(int64_t token, int64_t chunk, int64_t index, int64_t count, bool again) {
    if (task_.dropout.dropped == 0) return nullptr;
    if (shape_.chunks > kDrawnChunks) return draws_.draw(index, count, drawn_[0]);
    int16_t* kept = drawn_[token * kDrawnChunks + chunk];
    return again ? kept + index % kDrawsPerCounter : draws_.draw(index, count, kept);
  }

  void write_input_grad(int64_t first, int64_t tokens, int64_t column, int64_t columns,
                        const Factors& factors, ReadAhead& ahead) {
    Stored* out = static_cast<Stored*>(task_.grad_input) + first * shape_.features + column;
    const Real* down = task_.down_pairs ? task_.down_pairs : task_.down;
    const Rows<const Real> thin{down + column, task_.down_pitch};
    if (task_.dropout.dropped == 0) {
      expand_by<Stored>(factors, tokens, thin, columns,
                        {{out, shape_.features}, shape_.chunks, shape_.width, task_.accumulate}, ahead);
      return;
    }
    expand_by<Real>(factors, tokens, thin, columns, {{kept_[0], kKept}, 1, 0, false}, ahead);
    for (int64_t token = 0; token < tokens; ++token) {
      for (int64_t chunk = 0; chunk < shape_.chunks; ++chunk) {
        const int64_t offset = token * shape_.features + chunk * shape_.width;
        const int64_t index = first * shape_.features + column + offset;
        add_input_grad(kept_[token], draw(token, chunk, index, columns, task_.down_grad), columns,
                       out + offset);
      }
    }
  }

  void add_input_grad(const Real* grad, const int16_t* kept, int64_t columns, Stored* out) const {
    for (int64_t i = 0; i < columns; i += kLanes<Real>) {
      const int64_t count = columns - i;
      Vector<Real> value = load_vector(grad + i) * factors_.of(kept + i);
      if (task_.accumulate) value = value + widen_first<Real>(out + i, count);
      round_first<Real>(value, out + i, count);
    }
  }

  static constexpr int64_t kKept = pitch_of<Real>(kLoraColumns);
  // Of so many chunks what is drawn is drawn once for the adapter's and the input's gradient.
  static constexpr int kDrawnChunks = 2;

  const BlockLoraTask<Real>& task_;
  const BlockLoraShape shape_;
  const DropoutDraws draws_;
  const DropoutFactors<Real> factors_;
  Real factor_pairs_[kPairs<Stored> ? kLoraTile : 1][kMostPairedRanks / 2];
  alignas(kLineBytes) Real kept_[kLoraTile][kKept];
  int16_t drawn_[kLoraTile * kDrawnChunks][kLoraColumns + 2 * DropoutDraws::kBatch];
};

template <typename Stored, typename Real>
void forward(const BlockLoraTask<Real>& task, int64_t first, int64_t last) {
  Tile<Stored, Real> tile(task);
  for (int64_t begin = first; begin < last; begin += kLoraTile) {
    tile.forward(begin, smaller(last - begin, kLoraTile));
  }
}

template <typename Stored, typename Real>
void backward(const BlockLoraTask<Real>& task, int64_t first, int64_t last) {
  Tile<Stored, Real> tile(task);
  for (int64_t block = first; block < last; ++block) {
    Real* partial = task.partial + block * task.partial_size;
    set_zero(partial, task.grad_hidden);
    const int64_t start = block * task.block_tokens;
    const int64_t end = smaller(start + task.block_tokens, task.shape.tokens);
    for (int64_t begin = start; begin < end; begin += kLoraTile) {
      tile.backward(begin, smaller(end - begin, kLoraTile),
                    partial + task.grad_hidden + (begin - start) * task.shape.ranks, partial);
    }
  }
}

// Columns by the register, so that a transposed result's lines are written while they are in the cache.
template <typename Real>
void sum(const BlockLoraSum<Real>& task, int64_t first, int64_t last) {
  const Vector<Real> scale = repeat(task.scale);
  for (int64_t j = first; j < last; j += kLanes<Real>) {
    const int64_t count = smaller(last - j, kLanes<Real>);
    for (int64_t i = 0; i < task.rows; ++i) {
      Vector<Real> total{};
      for (int64_t block = 0; block < task.blocks; ++block) {
        total = total + widen_first<Real>(task.partial + block * task.stride + i * task.pitch + j, count);
      }
      Real totals[kLanes<Real>];
      store_vector(scale * total, totals);
      for (int64_t arm = 0; arm < task.arms; ++arm) {
        Real* out = task.out + i * task.row_stride + j * task.column_stride + arm * task.arm_stride;
        for (int64_t lane = 0; lane < count; ++lane) out[lane * task.column_stride] = totals[lane];
      }
    }
  }
}

template <typename Real>
void pack(const BlockLoraUp<Real>& task, int64_t first, int64_t last) {
  const Vector<Real> scale = repeat(task.scale);
  for (int64_t column = first; column < last; column += kLanes<Real>) {
    const int64_t count = smaller(last - column, kLanes<Real>);
    for (int64_t rank = 0; rank < task.rank; ++rank) {
      Real totals[kLanes<Real>] = {};
      for (int64_t arm = 0; arm < task.arms; ++arm) {
        const Real* up = task.up + (arm * task.out + column) * task.rank + rank;
        for (int64_t lane = 0; lane < count; ++lane) totals[lane] += up[lane * task.rank];
      }
      round_first<Real>(scale * load_vector(totals), task.packed + rank * task.pitch + column, count);
    }
  }
}

#if defined(__AVX512BF16__)
void pair(const BlockLoraPairs<float>& task, int64_t first, int64_t last) {
  for (int64_t rank = 0; rank < task.ranks; rank += 2) {
    const float* upper = task.thin + rank * task.pitch + first;
    Pairs::of_rows(upper, rank + 1 < task.ranks ? upper + task.pitch : nullptr, last - first,
                   task.pairs + rank / 2 * task.pitch + first);
  }
}
#else
constexpr decltype(BlockLoraBodies<float>::pair) pair = nullptr;
#endif

}  // namespace

const BlockLoraCpu block_lora_cpu = {
    {forward<double, double>, backward<double, double>, sum<double>, pack<double>, nullptr},
    {forward<float, float>, backward<float, float>, sum<float>, pack<float>, nullptr},
    {forward<BFloat16, float>, backward<BFloat16, float>, sum<float>, pack<float>, pair},
    {forward<Half, float>, backward<Half, float>, sum<float>, pack<float>, nullptr},
};

}  // namespace PARTUNE_ISA
}  // namespace partune
