// Tensors are walked as spans of neighbours in memory, each beside spans of its channels' vectors:
// parts of a row of channels, or, with channels first, parts of one channel beside constants. The
// loops over a span are those that the compiler turns into vectors.
#include "scale_shift_cpu.h"

#include "stream.h"

#ifndef PARTUNE_ISA
#error "PARTUNE_ISA names the namespace, and so the instruction set, that this file is built for"
#endif

namespace partune {
namespace PARTUNE_ISA {
namespace {

constexpr int kSpan = int(kSumColumns);
constexpr int kPlaneSpan = 512;  // as wide is what a channels-first unit treats as a row

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- forward ----

template <Activation kActivation, typename Stored, typename Real>
void forward_span(const Stored* input, const Real* bias, const Real* scale, const Real* shift, int count,
                  Stored* output) {
#pragma GCC ivdep
  for (int i = 0; i < count; ++i) {
    const Real y = scale_shift_element<kActivation>(widen(input[i]), bias[i], scale[i], shift[i]);
    round_nearest(y, output[i]);
  }
}

// One number per channel of a channels-first tensor, repeated.
template <typename Real>
struct Repeated {
  Real bias[kSpan], scale[kSpan], shift[kSpan];

  void fill(Real b, Real a, Real s, int count) {
    for (int i = 0; i < count; ++i) {
      bias[i] = b;
      scale[i] = a;
      shift[i] = s;
    }
  }
};

template <Activation kActivation, typename Stored, typename Real>
void forward_elements(const ScaleShiftForward<Real>& task, int64_t begin, int64_t end) {
  const Stored* input = static_cast<const Stored*>(task.input);
  Stored* output = static_cast<Stored*>(task.output);
  const bool rows = task.layout.inner == 1;
  const int64_t length = rows ? task.layout.channels : task.layout.inner;  // of a line
  Stored buffer[kSpan];
  Repeated<Real> repeated;
  int64_t line = begin / length, column = begin % length;
  for (int64_t position = begin; position < end; ++line, column = 0) {
    const int64_t stop = smaller(position + length - column, end);
    const int64_t channel = rows ? column : line % task.layout.channels;
    const Real *bias = task.bias + channel, *scale = task.scale + channel, *shift = task.shift + channel;
    if (!rows) {
      repeated.fill(*bias, *scale, *shift, int(smaller(stop - position, kSpan)));
      bias = repeated.bias, scale = repeated.scale, shift = repeated.shift;
    }
    while (position < stop) {
      const int count = int(smaller(stop - position, kSpan));
      Stored* target = task.stream ? buffer : output + position;
      forward_span<kActivation>(input + position, bias, scale, shift, count, target);
      if (task.stream) stream(buffer, output + position, count * int64_t(sizeof(Stored)));
      position += count;
      if (rows) bias += count, scale += count, shift += count;
    }
  }
  if (task.stream) finish_stream();
}

template <typename Stored, typename Real>
void forward(const ScaleShiftForward<Real>& task, int64_t begin, int64_t end) {
  switch (task.activation) {
    case Activation::kNone:
      return forward_elements<Activation::kNone, Stored>(task, begin, end);
    case Activation::kGelu:
      return forward_elements<Activation::kGelu, Stored>(task, begin, end);
    case Activation::kGeluTanh:
      return forward_elements<Activation::kGeluTanh, Stored>(task, begin, end);
  }
}

// ---- backward ----

// What is wanted of a backward.
enum class Wanted { kInput, kSums, kBoth };

// kLines lines of neighbours that stand `stride` apart, over the same vectors; their gradients are
// written `out_stride` apart, and their sums added to sums[0] and sums[1].
template <Activation kActivation, Wanted kWanted, int kLines, typename Stored, typename Real>
void backward_lines(const Stored* grad, const Stored* saved, int64_t stride, const Real* addend,
                    const Real* scale, const Real* shift, Real* along, Real* plain, int count, Stored* out,
                    int64_t out_stride) {
  constexpr bool kReadsSaved = kWanted != Wanted::kInput || kActivation != Activation::kNone;
#pragma GCC ivdep
  for (int i = 0; i < count; ++i) {
    Real sum_along = 0, sum_plain = 0;
    if constexpr (kWanted != Wanted::kInput) {
      sum_along = along[i];
      sum_plain = plain[i];
    }
    PARTUNE_UNROLL
    for (int line = 0; line < kLines; ++line) {
      const Real known = kReadsSaved ? widen(saved[line * stride + i]) : Real(0);
      const InnerGrad<Real> inner =
          inner_grad<kActivation>(widen(grad[line * stride + i]), known, addend[i], scale[i], shift[i]);
      if constexpr (kWanted != Wanted::kInput) {
        sum_along = multiply_add(inner.grad, inner.factor, sum_along);
        sum_plain += inner.grad;
      }
      if constexpr (kWanted != Wanted::kSums) {
        round_nearest(multiply(inner.grad, scale[i]), out[line * out_stride + i]);
      }
    }
    if constexpr (kWanted != Wanted::kInput) {
      along[i] = sum_along;
      plain[i] = sum_plain;
    }
  }
}

// A group of lines, its gradient by way of a buffer where it is streamed.
template <Activation kActivation, Wanted kWanted, int kLines, typename Stored, typename Real>
void backward_group(const ScaleShiftBackward<Real>& task, int64_t position, int64_t stride,
                    const Real* addend, const Real* scale, const Real* shift, Real* along, Real* plain,
                    int count, Stored* buffer) {
  const Stored* grad = static_cast<const Stored*>(task.grad) + position;
  const Stored* saved = task.saved ? static_cast<const Stored*>(task.saved) + position : nullptr;
  Stored* out = task.grad_input ? static_cast<Stored*>(task.grad_input) + position : nullptr;
  const bool streams = task.stream && kWanted != Wanted::kSums;
  backward_lines<kActivation, kWanted, kLines>(grad, saved, stride, addend, scale, shift, along, plain, count,
                                               streams ? buffer : out, streams ? int64_t(kSpan) : stride);
  if (streams) {
    for (int line = 0; line < kLines; ++line) {
      stream(buffer + line * kSpan, out + line * stride, count * int64_t(sizeof(Stored)));
    }
  }
}

// Lines taken at a time: fewer accesses to the sums, as far as registers go.
template <Activation kActivation>
constexpr int kLinesAtOnce = kActivation == Activation::kNone ? 4 : 1;

template <Activation kActivation, Wanted kWanted, typename Stored, typename Real>
void backward_block(const ScaleShiftBackward<Real>& task, int64_t position, int64_t lines, int64_t stride,
                    const Real* addend, const Real* scale, const Real* shift, Real* along, Real* plain,
                    int count) {
  constexpr int kGroup = kLinesAtOnce<kActivation>;
  Stored buffer[kGroup * kSpan];
  int64_t line = 0;
  for (; line + kGroup <= lines; line += kGroup) {
    backward_group<kActivation, kWanted, kGroup>(task, position + line * stride, stride, addend, scale, shift,
                                                 along, plain, count, buffer);
  }
  for (; line < lines; ++line) {
    backward_group<kActivation, kWanted, 1>(task, position + line * stride, stride, addend, scale, shift,
                                            along, plain, count, buffer);
  }
}

// Rows of channels: a unit is kSumRows rows of kSumColumns channels.
template <Activation kActivation, Wanted kWanted, typename Stored, typename Real>
void backward_rows(const ScaleShiftBackward<Real>& task, int64_t unit, int64_t per_row) {
  const int64_t channels = task.layout.channels;
  const int64_t row = unit / per_row * kSumRows, column = unit % per_row * kSumColumns;
  const int count = int(smaller(channels - column, kSumColumns));
  Real *along = nullptr, *plain = nullptr;
  if constexpr (kWanted != Wanted::kInput) {
    along = task.partial + unit / per_row * 2 * channels + column;
    plain = along + channels;
    for (int i = 0; i < count; ++i) along[i] = plain[i] = Real(0);
  }
  backward_block<kActivation, kWanted, Stored>(
      task, row * channels + column, smaller(task.layout.outer - row, kSumRows), channels,
      task.addend + column, task.scale + column, task.shift + column, along, plain, count);
}

// Channels first: a unit is up to kSumSegment neighbours of one channel, in lines of kPlaneSpan.
template <Activation kActivation, Wanted kWanted, typename Stored, typename Real>
void backward_plane(const ScaleShiftBackward<Real>& task, int64_t unit) {
  const int64_t channels = task.layout.channels, inner = task.layout.inner;
  const int64_t channel = unit % channels, sum_row = unit / channels;
  const int64_t segments = (inner + kSumSegment - 1) / kSumSegment;
  const int64_t outer = sum_row / segments, start = sum_row % segments * kSumSegment;
  const int64_t length = smaller(inner - start, kSumSegment);
  const int64_t position = (outer * channels + channel) * inner + start;
  const int width = int(smaller(length, kPlaneSpan));
  Repeated<Real> repeated;
  repeated.fill(task.addend[channel], task.scale[channel], task.shift[channel], width);
  Real along[kPlaneSpan] = {}, plain[kPlaneSpan] = {};
  const auto block = [&](int64_t from, int64_t lines, int count) {
    backward_block<kActivation, kWanted, Stored>(task, position + from, lines, kPlaneSpan, repeated.bias,
                                                 repeated.scale, repeated.shift, along, plain, count);
  };
  const int64_t lines = length / width;
  if (width == kPlaneSpan) {
    block(0, lines, width);
    if (lines * width < length) block(lines * width, 1, int(length - lines * width));
  } else {
    block(0, 1, width);
  }
  if constexpr (kWanted != Wanted::kInput) {
    for (int half = kPlaneSpan / 2; half >= 1; half /= 2) {
      for (int i = 0; i < half; ++i) {
        along[i] += along[i + half];
        plain[i] += plain[i + half];
      }
    }
    task.partial[sum_row * 2 * channels + channel] = along[0];
    task.partial[(sum_row * 2 + 1) * channels + channel] = plain[0];
  }
}

template <Activation kActivation, Wanted kWanted, typename Stored, typename Real>
void backward_part(const ScaleShiftBackward<Real>& task, int64_t begin, int64_t end) {
  const int64_t per_row = backward_units(task.layout).per_row;
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
