// A body takes a tile of tokens through all columns, a block of columns at a time: what it reads of the
// input is widened once, dropped from and summed over its chunks, and stays in the L2 cache for every
// product that needs it. float32 that needs nothing of that is read where it is.
#include "block_lora_cpu.h"

#include "philox_cpu.h"
#include "thin_products_cpu.h"

namespace partune {
namespace PARTUNE_ISA {
namespace {

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Between rows of what is kept: not a power of two, so that rows share no set of a cache.
constexpr int kKept = kLoraColumns + 16;

template <typename Stored, typename Real>
constexpr bool kIsWide = sizeof(Stored) == sizeof(Real);

// Factors of elements [first, first + count) of the input: 0, or the scale of what is kept.
template <typename Real>
class DropoutDraws {
 public:
  explicit DropoutDraws(const BlockLoraTask<Real>& task)
      : task_(task), scale_(dropout_scale<Real>(task.dropout)) {}

  const Real* draw(int64_t first, int64_t count) {
    const int64_t begin = first / kDrawsPerCounter, skipped = first % kDrawsPerCounter;
    uint64_t lanes[kWords];
    for (int i = 0; i < kWords; ++i) lanes[i] = uint64_t(begin + i);
    Words index = load_words(lanes);
    for (int64_t done = 0; done < skipped + count; done += kBatch, index = index + uint64_t(kWords)) {
      uint16_t draws[kBatch];
      draw_batch(index, draws);
      choose(draws, factors_ + done);
    }
    return factors_ + skipped;
  }

 private:
  static constexpr int kBatch = kWords * kDrawsPerCounter;

  // The halves of the counters' words, in order.
  void draw_batch(Words index, uint16_t (&draws)[kBatch]) const {
    const PhiloxWords drawn = philox(index, task_.step, task_.dropout.layer_id, task_.key);
    const Words low = (drawn.word[0] & 0xffffffffu) | drawn.word[1] << 32;
    const Words high = (drawn.word[2] & 0xffffffffu) | drawn.word[3] << 32;
    uint64_t halves[2 * kWords];
    for (int64_t i = 0; i < kWords; ++i) {
      halves[2 * i] = low[i];
      halves[2 * i + 1] = high[i];
    }
    __builtin_memcpy(draws, halves, sizeof draws);
  }

  void choose(const uint16_t (&draws)[kBatch], float* factors) const {
    const FloatBits kept = (FloatBits)repeat(scale_);
    for (int i = 0; i < kBatch; i += kLanes<float>) {
      Halves narrow;
      __builtin_memcpy(&narrow, draws + i, sizeof narrow);
      const FloatBits wide = __builtin_convertvector(narrow, FloatBits);
      store_vector((Vector<float>)(kept & (FloatBits)(wide >= task_.dropout.dropped)), factors + i);
    }
  }
  void choose(const uint16_t (&draws)[kBatch], double* factors) const {
    for (int i = 0; i < kBatch; ++i) factors[i] = draws[i] >= task_.dropout.dropped ? scale_ : 0.0;
  }

  const BlockLoraTask<Real>& task_;
  const Real scale_;
  Real factors_[kLoraColumns + 2 * kBatch];
};

template <typename Stored, typename Real>
class Tile {
 public:
  explicit Tile(const BlockLoraTask<Real>& task) : task_(task), shape_(task.shape), draws_(task) {}

  // Tokens [first, first + tokens), forward.
  void forward(int64_t first, int64_t tokens) {
    Real* hidden = task_.hidden + first * shape_.ranks;
    for (int64_t i = 0; i < tokens * shape_.ranks; ++i) hidden[i] = Real(0);
    for (int64_t column = 0; column < shape_.width; column += kLoraColumns) {
      const int64_t columns = smaller(shape_.width - column, kLoraColumns), next = column + kLoraColumns;
      ReadAhead ahead = next < shape_.width ? input_ahead(first, next) : member_ahead(0, first, 0);
      ahead.spread(project_steps<Real>(tokens, shape_.ranks, columns));
      project<Real>(read_input(first, tokens, column, columns), tokens, {task_.down + column, shape_.width},
                    shape_.ranks, columns, {hidden, shape_.ranks}, ahead);
    }
    for (int64_t i = 0; i < task_.member_count; ++i) {
      const BlockLoraMember<Real>& m = task_.members[i];
      Stored* output = static_cast<Stored*>(m.output) + first * m.out;
      for (int64_t column = 0; column < m.out; column += kLoraColumns) {
        const int64_t columns = smaller(m.out - column, kLoraColumns);
        ReadAhead ahead = ahead_of_member(i, first, column);
        if (ahead.is_empty()) ahead = input_ahead(first + tokens, 0);
        ahead.spread(expand_steps<Real>(tokens, m.rank, columns));
        expand<Stored, Real>({hidden + m.first, shape_.ranks}, tokens, {m.up + column, m.out}, m.rank,
                             columns, {{output + column, m.out}, 1, 0, true}, ahead);
      }
    }
  }

  // The same backward; `partial` is its block's, grad_hidden its tokens' part of that.
  void backward(int64_t first, int64_t tokens, Real* grad_hidden, Real* partial) {
    for (int64_t i = 0; i < tokens * shape_.ranks; ++i) grad_hidden[i] = Real(0);
    for (int64_t i = 0; i < task_.member_count; ++i) read_gradient(i, first, tokens, grad_hidden, partial);
    if (!task_.down_grad && !task_.grad_input) return;
    Real* sums = partial + task_.block_tokens * shape_.ranks;
    for (int64_t column = 0; column < shape_.width; column += kLoraColumns) {
      const int64_t columns = smaller(shape_.width - column, kLoraColumns), next = column + kLoraColumns;
      if (task_.down_grad) {
        ReadAhead ahead = task_.grad_input ? grad_ahead(first, column) : input_ahead(first, next);
        ahead.spread(accumulate_steps<Real>(tokens, shape_.ranks, columns));
        accumulate<Real>({grad_hidden, shape_.ranks}, read_input(first, tokens, column, columns), tokens,
                         shape_.ranks, columns, {sums + column, shape_.width}, ahead);
      }
      if (task_.grad_input) {
        ReadAhead ahead = task_.down_grad ? input_ahead(first, next) : grad_ahead(first, next);
        if (ahead.is_empty()) ahead = member_ahead(0, first + tokens, 0);
        ahead.spread(expand_steps<Real>(tokens, shape_.ranks, columns));
        write_input_grad(first, tokens, column, columns, grad_hidden, ahead);
      }
    }
  }

 private:
  bool is_plain() const { return shape_.chunks == 1 && task_.dropout.dropped == 0; }

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
      const Rows<const Real> read = widened(grad + column, m.out, tokens, columns);
      ReadAhead ahead = ahead_of_member(member, first, column);
      if (ahead.is_empty()) {
        ahead = task_.down_grad    ? input_ahead(first, 0)
                : task_.grad_input ? grad_ahead(first, 0)
                                   : member_ahead(0, first + tokens, 0);
      }
      ahead.spread((inner ? project_steps<Real>(tokens, m.rank, columns) : 0) +
                   (task_.up_grad ? accumulate_steps<Real>(tokens, m.rank, columns) : 0));
      if (inner) {
        project<Real>(read, tokens, {m.up + column, m.out}, m.rank, columns,
                      {grad_hidden + m.first, shape_.ranks}, ahead);
      }
      if (task_.up_grad) {
        accumulate<Real>({hidden, shape_.ranks}, read, tokens, m.rank, columns,
                         {partial + m.partial + column, m.out}, ahead);
      }
    }
  }

  Rows<const Real> widened(const Stored* from, int64_t stride, int64_t tokens, int64_t columns) {
    if constexpr (kIsWide<Stored, Real>) {
      return {from, stride};
    } else {
      for (int64_t token = 0; token < tokens; ++token) {
        add_chunk<false>(from + token * stride, nullptr, columns, kept_[token]);
      }
      return {kept_[0], kKept};
    }
  }

  // to = (add ? to : 0) + factors·from.
  template <bool kAdd>
  static void add_chunk(const Stored* from, const Real* factors, int64_t columns, Real* to) {
    for (int64_t i = 0; i < columns; i += kLanes<Real>) {
      const int64_t count = columns - i;
      Vector<Real> read = widen_first<Real>(from + i, count);
      if (factors) read = read * load_vector(factors + i);
      if (kAdd) read = read + load_vector(to + i);
      store_vector(read, to + i);
    }
  }

  // What the down-projections read of columns [column, column + columns): dropped from, chunks summed.
  Rows<const Real> read_input(int64_t first, int64_t tokens, int64_t column, int64_t columns) {
    const Stored* input = static_cast<const Stored*>(task_.input) + first * shape_.features + column;
    if (is_plain()) return widened(input, shape_.features, tokens, columns);
    for (int64_t token = 0; token < tokens; ++token) {
      for (int64_t chunk = 0; chunk < shape_.chunks; ++chunk) {
        const int64_t offset = token * shape_.features + chunk * shape_.width;
        const Real* factors = draw(first * shape_.features + column + offset, columns);
        if (chunk == 0) {
          add_chunk<false>(input + offset, factors, columns, kept_[token]);
        } else {
          add_chunk<true>(input + offset, factors, columns, kept_[token]);
        }
      }
    }
    return {kept_[0], kKept};
  }

  const Real* draw(int64_t index, int64_t count) {
    return task_.dropout.dropped ? draws_.draw(index, count) : nullptr;
  }

  void write_input_grad(int64_t first, int64_t tokens, int64_t column, int64_t columns,
                        const Real* grad_hidden, ReadAhead& ahead) {
    Stored* out = static_cast<Stored*>(task_.grad_input) + first * shape_.features + column;
    const Rows<const Real> factors{grad_hidden, shape_.ranks}, thin{task_.down + column, shape_.width};
    if (task_.dropout.dropped == 0) {
      expand<Stored, Real>(factors, tokens, thin, shape_.ranks, columns,
                           {{out, shape_.features}, shape_.chunks, shape_.width, task_.accumulate}, ahead);
      return;
    }
    expand<Real, Real>(factors, tokens, thin, shape_.ranks, columns, {{kept_[0], kKept}, 1, 0, false}, ahead);
    for (int64_t token = 0; token < tokens; ++token) {
      for (int64_t chunk = 0; chunk < shape_.chunks; ++chunk) {
        const int64_t offset = token * shape_.features + chunk * shape_.width;
        add_input_grad(kept_[token], draw(first * shape_.features + column + offset, columns), columns,
                       out + offset);
      }
    }
  }

  void add_input_grad(const Real* grad, const Real* factors, int64_t columns, Stored* out) const {
    for (int64_t i = 0; i < columns; i += kLanes<Real>) {
      const int64_t count = columns - i;
      Vector<Real> value = load_vector(grad + i) * load_vector(factors + i);
      if (task_.accumulate) value = value + widen_first<Real>(out + i, count);
      round_first<Real>(value, out + i, count);
    }
  }

  const BlockLoraTask<Real>& task_;
  const BlockLoraShape shape_;
  DropoutDraws<Real> draws_;
  Real kept_[kLoraTile][kKept];
};

template <typename Stored, typename Real>
void forward(const BlockLoraTask<Real>& task, int64_t first, int64_t last) {
  Tile<Stored, Real> tile(task);
  for (int64_t i = first; i < last; ++i) {
    const int64_t begin = i * kLoraTile;
    tile.forward(begin, smaller(task.shape.tokens - begin, kLoraTile));
  }
}

template <typename Stored, typename Real>
void backward(const BlockLoraTask<Real>& task, int64_t first, int64_t last) {
  Tile<Stored, Real> tile(task);
  for (int64_t block = first; block < last; ++block) {
    Real* partial = task.partial + block * task.partial_size;
    for (int64_t i = task.block_tokens * task.shape.ranks; i < task.partial_size; ++i) partial[i] = Real(0);
    const int64_t start = block * task.block_tokens;
    const int64_t end = smaller(start + task.block_tokens, task.shape.tokens);
    for (int64_t begin = start; begin < end; begin += kLoraTile) {
      tile.backward(begin, smaller(end - begin, kLoraTile), partial + (begin - start) * task.shape.ranks,
                    partial);
    }
  }
}

template <typename Real>
void sum(const BlockLoraSum<Real>& task, int64_t first, int64_t last) {
  for (int64_t i = 0; i < task.rows; ++i) {
    for (int64_t j = first; j < last; ++j) {
      Real total = Real(0);
      for (int64_t block = 0; block < task.blocks; ++block) {
        total += task.partial[block * task.stride + i * task.columns + j];
      }
      for (int64_t arm = 0; arm < task.arms; ++arm) {
        task.out[i * task.row_stride + j * task.column_stride + arm * task.arm_stride] = task.scale * total;
      }
    }
  }
}

template <typename Real>
void pack(const BlockLoraUp<Real>& task, int64_t first, int64_t last) {
  for (int64_t rank = 0; rank < task.rank; ++rank) {
    for (int64_t column = first; column < last; ++column) {
      Real total = Real(0);
      for (int64_t arm = 0; arm < task.arms; ++arm) {
        total += task.up[(arm * task.out + column) * task.rank + rank];
      }
      task.packed[rank * task.out + column] = task.scale * total;
    }
  }
}

}  // namespace

const BlockLoraCpu block_lora_cpu = {
    {forward<double, double>, backward<double, double>, sum<double>, pack<double>},
    {forward<float, float>, backward<float, float>, sum<float>, pack<float>},
    {forward<BFloat16, float>, backward<BFloat16, float>, sum<float>, pack<float>},
    {forward<Half, float>, backward<Half, float>, sum<float>, pack<float>},
};

}  // namespace PARTUNE_ISA
}  // namespace partune
