// Tensors are walked as lines of neighbours in memory beside spans of their channels' vectors: parts of
// rows of channels, or, with channels first, parts of one channel beside constants. Lines of the same
// channels are taken several at a time, so that the vectors are read less often.
#include "scale_shift_cpu.h"

#include "lanes.h"
#include "stream.h"

#ifndef PARTUNE_ISA
#error "PARTUNE_ISA names the namespace, and so the instruction set, that this file is built for"
#endif

namespace partune {
namespace PARTUNE_ISA {
namespace {

constexpr int kSpan =
    1024;  // neighbours of a line taken at a time: a buffer of several stays in the L1 cache
constexpr int kPlaneSpan = 512;  // as wide is what a channels-first unit treats as a row

// Lines taken at a time, as far as registers go.
template <Activation kActivation>
constexpr int kLinesAtOnce = kActivation == Activation::kNone ? 4 : 2;

template <int kCount>
struct Group {
  static constexpr int kLines = kCount;
};

// body(Group, first line, lines between two of the group, first neighbour, neighbours) over all of some
// lines. Those of a group are far apart, so that each is a stream in memory of its own: more misses are
// under way than in one.
template <int kGroup, typename Body>
inline __attribute__((always_inline)) void for_groups(int64_t lines, int count, const Body& body) {
  const int64_t apart = lines / kGroup;
  for (int64_t line = 0; line < apart; ++line) {
    for (int first = 0; first < count; first += kSpan) {
      body(Group<kGroup>(), line, apart, first, int(smaller(count - first, kSpan)));
    }
  }
  for (int64_t line = apart * kGroup; line < lines; ++line) {
    for (int first = 0; first < count; first += kSpan) {
      body(Group<1>(), line, int64_t{0}, first, int(smaller(count - first, kSpan)));
    }
  }
}

// The vectors of a span's channels; addend is bias, or what inner_grad wants.
template <typename Real>
struct Vectors {
  const Real *addend, *scale, *shift;

  PARTUNE_MEMBER Vectors from(int64_t channel) const {
    return {addend + channel, scale + channel, shift + channel};
  }
};

template <typename Real>
struct PaddedVectors {
  Padded<Real, Real> addend, scale, shift;

  PARTUNE_MEMBER PaddedVectors(const Vectors<Real>& vectors, int count)
      : addend(vectors.addend, count), scale(vectors.scale, count), shift(vectors.shift, count) {}
  PARTUNE_MEMBER Vectors<Real> all() const { return {addend.at, scale.at, shift.at}; }
};

// One number per channel of a channels-first tensor, repeated.
template <typename Real>
struct Repeated {
  Real addend[kPlaneSpan], scale[kPlaneSpan], shift[kPlaneSpan];

  Repeated(const Vectors<Real>& vectors, int count) {
    for (int i = 0; i < count; ++i) {
      addend[i] = *vectors.addend;
      scale[i] = *vectors.scale;
      shift[i] = *vectors.shift;
    }
  }
  Vectors<Real> all() const { return {addend, scale, shift}; }
};

// Of channels-first tensors a unit is up to kSumSegment neighbours of one channel, in lines of
// kPlaneSpan or, where there are fewer, one line.
struct PlaneUnit {
  int64_t channel, sum_row, position, length;

  PlaneUnit(const ChannelLayout& layout, int64_t unit)
      : channel(unit % layout.channels), sum_row(unit / layout.channels) {
    const int64_t segments = (layout.inner + kSumSegment - 1) / kSumSegment;
    const int64_t outer = sum_row / segments, start = sum_row % segments * kSumSegment;
    length = smaller(layout.inner - start, kSumSegment);
    position = (outer * layout.channels + channel) * layout.inner + start;
  }
};

// body(first neighbour, lines, count of each)
template <typename Body>
inline __attribute__((always_inline)) void for_plane_lines(const PlaneUnit& unit, const Body& body) {
  const int64_t lines = unit.length / kPlaneSpan, whole = lines * kPlaneSpan;
  if (lines > 0) body(unit.position, lines, kPlaneSpan);
  if (whole < unit.length) body(unit.position + whole, int64_t{1}, int(unit.length - whole));
}

// ---- forward ----

// kTwice neighbours of each line.
template <Activation kActivation, int kLines, typename Stored, typename Real>
PARTUNE_FN void forward_step(const Stored* input, int64_t stride, const Vectors<Real>& vectors,
                             Stored* output, int64_t output_stride) {
  const auto addend = load_lanes(vectors.addend), scale = load_lanes(vectors.scale),
             shift = load_lanes(vectors.shift);
  PARTUNE_UNROLL
  for (int line = 0; line < kLines; ++line) {
    TwoLanes<Real> lanes = load_lanes(input + line * stride);
    PARTUNE_UNROLL
    for (int i = 0; i < 2; ++i) {
      lanes.at[i] = scale_shift_element<kActivation>(lanes.at[i], addend.at[i], scale.at[i], shift.at[i]);
    }
    store_lanes(lanes, output + line * output_stride);
  }
}

template <Activation kActivation, int kLines, typename Stored, typename Real>
void forward_lines(const Stored* input, int64_t stride, const Vectors<Real>& vectors, int count,
                   Stored* output, int64_t output_stride) {
  int i = 0;
  for (; i + kTwice<Real> <= count; i += kTwice<Real>) {
    forward_step<kActivation, kLines>(input + i, stride, vectors.from(i), output + i, output_stride);
  }
  if (i == count) return;
  const PaddedVectors<Real> rest(vectors.from(i), count - i);
  for (int line = 0; line < kLines; ++line) {
    Padded<Real, Stored> part(input + line * stride + i, count - i);
    forward_step<kActivation, 1>(part.at, 0, rest.all(), part.at, 0);
    part.copy_to(output + line * output_stride + i, count - i);
  }
}

// A group of lines, by way of a buffer where they are streamed.
template <Activation kActivation, int kLines, typename Stored, typename Real>
void forward_group(const ScaleShiftForward<Real>& task, int64_t position, int64_t stride,
                   const Vectors<Real>& vectors, int count, Stored* buffer) {
  const Stored* input = static_cast<const Stored*>(task.input) + position;
  Stored* output = static_cast<Stored*>(task.output) + position;
  if (!task.stream) {
    return forward_lines<kActivation, kLines>(input, stride, vectors, count, output, stride);
  }
  forward_lines<kActivation, kLines>(input, stride, vectors, count, buffer, int64_t(kSpan));
  for (int line = 0; line < kLines; ++line) {
    stream(buffer + line * kSpan, output + line * stride, count * int64_t(sizeof(Stored)));
  }
}

template <Activation kActivation, typename Stored, typename Real>
void forward_block(const ScaleShiftForward<Real>& task, int64_t position, int64_t lines, int64_t stride,
                   const Vectors<Real>& vectors, int count) {
  Stored buffer[kLinesAtOnce<kActivation> * kSpan];
  for_groups<kLinesAtOnce<kActivation>>(
      lines, count, [&](auto group, int64_t line, int64_t apart, int first, int width) {
        forward_group<kActivation, decltype(group)::kLines>(
            task, position + line * stride + first, apart * stride, vectors.from(first), width, buffer);
      });
}

template <Activation kActivation, typename Stored, typename Real>
void forward_units_of(const ScaleShiftForward<Real>& task, int64_t begin, int64_t end) {
  const ChannelLayout& layout = task.layout;
  const int64_t channels = layout.channels, per_row = work_units(layout).per_row;
  const Vectors<Real> vectors{task.bias, task.scale, task.shift};
  for (int64_t index = begin; index < end; ++index) {
    if (layout.inner == 1) {
      const int64_t row = index / per_row * kSumRows, column = index % per_row * kSumColumns;
      forward_block<kActivation, Stored>(task, row * channels + column, smaller(layout.outer - row, kSumRows),
                                         channels, vectors.from(column),
                                         int(smaller(channels - column, kSumColumns)));
    } else {
      const PlaneUnit unit(layout, index);
      const Repeated<Real> repeated(vectors.from(unit.channel), int(smaller(unit.length, kPlaneSpan)));
      for_plane_lines(unit, [&](int64_t position, int64_t lines, int count) {
        forward_block<kActivation, Stored>(task, position, lines, kPlaneSpan, repeated.all(), count);
      });
    }
  }
  if (task.stream) finish_stream();
}

template <typename Stored, typename Real>
void forward(const ScaleShiftForward<Real>& task, int64_t begin, int64_t end) {
  switch (task.activation) {
    case Activation::kNone:
      return forward_units_of<Activation::kNone, Stored>(task, begin, end);
    case Activation::kGelu:
      return forward_units_of<Activation::kGelu, Stored>(task, begin, end);
    case Activation::kGeluTanh:
      return forward_units_of<Activation::kGeluTanh, Stored>(task, begin, end);
  }
}

// ---- backward ----

// What is wanted of a backward.
enum class Wanted { kInput, kSums, kBoth };

// kTwice neighbours of each line; their parts of the sums are added to along and plain.
template <Activation kActivation, Wanted kWanted, int kLines, typename Stored, typename Real>
PARTUNE_FN void backward_step(const Stored* grad, const Stored* saved, int64_t stride,
                              const Vectors<Real>& vectors, Real* along, Real* plain, Stored* out,
                              int64_t out_stride) {
  constexpr bool kReadsSaved = kWanted != Wanted::kInput || kActivation != Activation::kNone;
  const auto addend = load_lanes(vectors.addend), scale = load_lanes(vectors.scale),
             shift = load_lanes(vectors.shift);
  TwoLanes<Real> sum_along, sum_plain;
  if constexpr (kWanted != Wanted::kInput) {
    sum_along = load_lanes(along);
    sum_plain = load_lanes(plain);
  }
  PARTUNE_UNROLL
  for (int line = 0; line < kLines; ++line) {
    TwoLanes<Real> lanes = load_lanes(grad + line * stride), known{};
    if constexpr (kReadsSaved) known = load_lanes(saved + line * stride);
    PARTUNE_UNROLL
    for (int i = 0; i < 2; ++i) {
      const InnerGrad<Lanes<Real>> inner =
          inner_grad<kActivation>(lanes.at[i], known.at[i], addend.at[i], scale.at[i], shift.at[i]);
      if constexpr (kWanted != Wanted::kInput) {
        sum_along.at[i] = multiply_add(inner.grad, inner.factor, sum_along.at[i]);
        sum_plain.at[i] = sum_plain.at[i] + inner.grad;
      }
      lanes.at[i] = multiply(inner.grad, scale.at[i]);
    }
    if constexpr (kWanted != Wanted::kSums) store_lanes(lanes, out + line * out_stride);
  }
  if constexpr (kWanted != Wanted::kInput) {
    store_lanes(sum_along, along);
    store_lanes(sum_plain, plain);
  }
}

// Lines of neighbours that stand `stride` apart; their gradients are written `out_stride` apart.
template <Activation kActivation, Wanted kWanted, int kLines, typename Stored, typename Real>
void backward_lines(const Stored* grad, const Stored* saved, int64_t stride, const Vectors<Real>& vectors,
                    Real* along, Real* plain, int count, Stored* out, int64_t out_stride) {
  constexpr bool kSums = kWanted != Wanted::kInput;
  int i = 0;
  for (; i + kTwice<Real> <= count; i += kTwice<Real>) {
    backward_step<kActivation, kWanted, kLines>(grad + i, saved + i, stride, vectors.from(i), along + i,
                                                plain + i, out + i, out_stride);
  }
  if (i == count) return;
  const int left = count - i;
  const PaddedVectors<Real> rest(vectors.from(i), left);
  Padded<Real, Real> sum_along(along + i, kSums ? left : 0), sum_plain(plain + i, kSums ? left : 0);
  for (int line = 0; line < kLines; ++line) {
    const int64_t at = line * stride + i;
    Padded<Real, Stored> part(grad + at, left);
    const Padded<Real, Stored> known(saved + at, saved ? left : 0);
    backward_step<kActivation, kWanted, 1>(part.at, known.at, 0, rest.all(), sum_along.at, sum_plain.at,
                                           part.at, 0);
    if constexpr (kWanted != Wanted::kSums) part.copy_to(out + line * out_stride + i, left);
  }
  if constexpr (kSums) {
    sum_along.copy_to(along + i, left);
    sum_plain.copy_to(plain + i, left);
  }
}

// A group of lines, its gradient by way of a buffer where it is streamed.
template <Activation kActivation, Wanted kWanted, int kLines, typename Stored, typename Real>
void backward_group(const ScaleShiftBackward<Real>& task, int64_t position, int64_t stride,
                    const Vectors<Real>& vectors, Real* along, Real* plain, int count, Stored* buffer) {
  const Stored* grad = static_cast<const Stored*>(task.grad) + position;
  const Stored* saved = task.saved ? static_cast<const Stored*>(task.saved) + position : nullptr;
  Stored* out = task.grad_input ? static_cast<Stored*>(task.grad_input) + position : nullptr;
  const bool streams = task.stream && kWanted != Wanted::kSums;
  backward_lines<kActivation, kWanted, kLines>(grad, saved, stride, vectors, along, plain, count,
                                               streams ? buffer : out, streams ? int64_t(kSpan) : stride);
  if (streams) {
    for (int line = 0; line < kLines; ++line) {
      stream(buffer + line * kSpan, out + line * stride, count * int64_t(sizeof(Stored)));
    }
  }
}

template <Activation kActivation, Wanted kWanted, typename Stored, typename Real>
void backward_block(const ScaleShiftBackward<Real>& task, int64_t position, int64_t lines, int64_t stride,
                    const Vectors<Real>& vectors, Real* along, Real* plain, int count) {
  Stored buffer[kLinesAtOnce<kActivation> * kSpan];
  for_groups<kLinesAtOnce<kActivation>>(
      lines, count, [&](auto group, int64_t line, int64_t apart, int first, int width) {
        backward_group<kActivation, kWanted, decltype(group)::kLines>(
            task, position + line * stride + first, apart * stride, vectors.from(first), along + first,
            plain + first, width, buffer);
      });
}

// Rows of channels: a unit is kSumRows rows of kSumColumns channels.
template <Activation kActivation, Wanted kWanted, typename Stored, typename Real>
void backward_rows(const ScaleShiftBackward<Real>& task, int64_t unit, int64_t per_row) {
  const int64_t channels = task.layout.channels;
  const int64_t row = unit / per_row * kSumRows, column = unit % per_row * kSumColumns;
  const int count = int(smaller(channels - column, kSumColumns));
  const Vectors<Real> vectors{task.addend, task.scale, task.shift};
  Real *along = nullptr, *plain = nullptr;
  if constexpr (kWanted != Wanted::kInput) {
    along = task.partial + unit / per_row * 2 * channels + column;
    plain = along + channels;
    for (int i = 0; i < count; ++i) along[i] = plain[i] = Real(0);
  }
  backward_block<kActivation, kWanted, Stored>(task, row * channels + column,
                                               smaller(task.layout.outer - row, kSumRows), channels,
                                               vectors.from(column), along, plain, count);
}

template <Activation kActivation, Wanted kWanted, typename Stored, typename Real>
void backward_plane(const ScaleShiftBackward<Real>& task, int64_t index) {
  const PlaneUnit unit(task.layout, index);
  const Vectors<Real> vectors{task.addend, task.scale, task.shift};
  const Repeated<Real> repeated(vectors.from(unit.channel), int(smaller(unit.length, kPlaneSpan)));
  Real along[kPlaneSpan] = {}, plain[kPlaneSpan] = {};
  for_plane_lines(unit, [&](int64_t position, int64_t lines, int count) {
    backward_block<kActivation, kWanted, Stored>(task, position, lines, kPlaneSpan, repeated.all(), along,
                                                 plain, count);
  });
  if constexpr (kWanted != Wanted::kInput) {
    for (int half = kPlaneSpan / 2; half >= 1; half /= 2) {
      for (int i = 0; i < half; ++i) {
        along[i] += along[i + half];
        plain[i] += plain[i + half];
      }
    }
    const int64_t channels = task.layout.channels;
    task.partial[unit.sum_row * 2 * channels + unit.channel] = along[0];
    task.partial[(unit.sum_row * 2 + 1) * channels + unit.channel] = plain[0];
  }
}

template <Activation kActivation, Wanted kWanted, typename Stored, typename Real>
void backward_part(const ScaleShiftBackward<Real>& task, int64_t begin, int64_t end) {
  const int64_t per_row = work_units(task.layout).per_row;
  for (int64_t unit = begin; unit < end; ++unit) {
    if (task.layout.inner == 1) {
      backward_rows<kActivation, kWanted, Stored>(task, unit, per_row);
    } else {
      backward_plane<kActivation, kWanted, Stored>(task, unit);
    }
  }
  if (task.stream) finish_stream();
}

template <Activation kActivation, typename Stored, typename Real>
void backward_wanted(const ScaleShiftBackward<Real>& task, int64_t begin, int64_t end) {
  if (!task.partial) {
    backward_part<kActivation, Wanted::kInput, Stored>(task, begin, end);
  } else if (!task.grad_input) {
    backward_part<kActivation, Wanted::kSums, Stored>(task, begin, end);
  } else {
    backward_part<kActivation, Wanted::kBoth, Stored>(task, begin, end);
  }
}

template <typename Stored, typename Real>
void backward(const ScaleShiftBackward<Real>& task, int64_t begin, int64_t end) {
  switch (task.activation) {
    case Activation::kNone:
      return backward_wanted<Activation::kNone, Stored>(task, begin, end);
    case Activation::kGelu:
      return backward_wanted<Activation::kGelu, Stored>(task, begin, end);
    case Activation::kGeluTanh:
      return backward_wanted<Activation::kGeluTanh, Stored>(task, begin, end);
  }
}

// ---- the sum of the partial sums, in their order ----

template <typename Stored, typename Real>
void sum_columns(const ColumnSums<Real>& task, int64_t begin, int64_t end) {
  constexpr int kTile = 256;
  for (int64_t first = begin; first < end; first += kTile) {
    const int count = int(smaller(end - first, kTile));
    Real along[kTile] = {}, plain[kTile] = {};
    for (int64_t row = 0; row < task.rows; ++row) {
      const Real* partial = task.partial + row * 2 * task.channels + first;
      for (int i = 0; i < count; ++i) {
        along[i] += partial[i];
        plain[i] += partial[task.channels + i];
      }
    }
    for (int i = 0; i < count; ++i) {
      const int64_t channel = first + i;
      if (task.factor) along[i] = multiply(along[i], task.factor[channel]);
      if (task.offset) along[i] = multiply_add(plain[i], task.offset[channel], along[i]);
      if (task.divisor) along[i] = divide(along[i], task.divisor[channel]);
      if (task.wide) {
        static_cast<Real*>(task.grad_scale)[channel] = along[i];
        static_cast<Real*>(task.grad_shift)[channel] = plain[i];
      } else {
        round_nearest(along[i], static_cast<Stored*>(task.grad_scale)[channel]);
        round_nearest(plain[i], static_cast<Stored*>(task.grad_shift)[channel]);
      }
    }
  }
}

}  // namespace

const ScaleShiftCpu scale_shift_cpu = {
    {forward<double, double>, backward<double, double>, sum_columns<double, double>},
    {forward<float, float>, backward<float, float>, sum_columns<float, float>},
    {forward<BFloat16, float>, backward<BFloat16, float>, sum_columns<BFloat16, float>},
    {forward<Half, float>, backward<Half, float>, sum_columns<Half, float>},
};

}  // namespace PARTUNE_ISA
}  // namespace partune
