// The CPU bodies of family scale_shift, as tables: one is built per ISA. Vectors are widened: whoever
// calls hands in [channels] arrays of the computing type, zeros or ones where there is no vector.
#pragma once
#include "scale_shift.h"

namespace partune {

// Rows that a unit of work takes, and that one partial column sum covers. Fixed, so that results don't
// depend on the threads.
constexpr int64_t kSumRows = 64;
// Of channels-first tensors: how many neighbours in memory one partial sum covers.
constexpr int64_t kSumSegment = 8192;
// Columns of rows × channels that a unit of work takes: its sums stay in the nearest caches.
constexpr int64_t kSumColumns = 4096;

template <typename Real>
struct ScaleShiftForward {
  ChannelLayout layout;
  const void* input;
  void* output;
  const Real *bias, *scale, *shift;  // [channels]
  Activation activation;
  bool stream;  // write around the caches
};

template <typename Real>
struct ScaleShiftBackward {
  ChannelLayout layout;
  const void* grad;
  const void* saved;                   // null: not needed
  void* grad_input;                    // null: not wanted
  const Real *addend, *scale, *shift;  // [channels]
  Real* partial;                       // [units' rows, 2, channels]; null: not wanted
  Activation activation;
  bool stream;
};

// Sums partial [rows, 2, channels]: scale's gradient is (sum 0·factor + sum 1·offset)/divisor.
template <typename Real>
struct ColumnSums {
  const Real* partial;
  int64_t rows, channels;
  const Real *factor, *offset, *divisor;  // [channels]; null: 1, 0, 1
  void *grad_scale, *grad_shift;          // [channels]
  bool wide;                              // the two have the computing type, not the stored one
};

template <typename Real>
struct NormForward {
  int64_t channels;
  const void* input;
  void* output;
  const Real *gain, *offset;  // [channels], weight·scale and bias·scale + shift
  Real *mean, *rstd;          // [rows]; no mean: RMSNorm
  Real eps;
  bool stream;
};

template <typename Real>
struct NormBackward {
  int64_t rows, channels;
  const void *grad, *input;
  const Real *mean, *rstd;  // [rows]; no mean: RMSNorm
  const Real* gain;         // [channels], weight·scale
  void* grad_input;         // null: not wanted
  Real* partial;            // [blocks of kSumRows rows, 2, channels]; null: not wanted
  bool stream;
};

// The bodies of one stored dtype.
template <typename Real>
struct ScaleShiftBodies {
  // Units [begin, end): see work_units.
  void (*forward)(const ScaleShiftForward<Real>&, int64_t begin, int64_t end);
  // Units [begin, end): see work_units.
  void (*backward)(const ScaleShiftBackward<Real>&, int64_t begin, int64_t end);
  // Channels [begin, end).
  void (*sum_columns)(const ColumnSums<Real>&, int64_t begin, int64_t end);
};

template <typename Real>
struct NormBodies {
  void (*forward)(const NormForward<Real>&, int64_t begin, int64_t end);    // rows
  void (*backward)(const NormBackward<Real>&, int64_t begin, int64_t end);  // blocks of kSumRows rows
};

struct ScaleShiftCpu {
  ScaleShiftBodies<double> float64;
  ScaleShiftBodies<float> float32, bfloat16, half;
};

struct ScaleShiftNormCpu {
  NormBodies<double> float64;
  NormBodies<float> float32, bfloat16, half;
};

namespace baseline {
extern const ScaleShiftCpu scale_shift_cpu;
extern const ScaleShiftNormCpu scale_shift_norm_cpu;
}  // namespace baseline
namespace avx2 {
extern const ScaleShiftCpu scale_shift_cpu;
extern const ScaleShiftNormCpu scale_shift_norm_cpu;
}  // namespace avx2
namespace avx512 {
extern const ScaleShiftCpu scale_shift_cpu;
extern const ScaleShiftNormCpu scale_shift_norm_cpu;
}  // namespace avx512
namespace avx512_bf16 {
extern const ScaleShiftCpu scale_shift_cpu;
extern const ScaleShiftNormCpu scale_shift_norm_cpu;
}  // namespace avx512_bf16

// How work is divided: rows of units, and units in each. Of a backward, a row of units leaves a row of
// partial sums.
struct WorkUnits {
  int64_t rows, per_row;
};

PARTUNE_FN WorkUnits work_units(const ChannelLayout& layout) {
  if (layout.inner == 1) {
    return {(layout.outer + kSumRows - 1) / kSumRows, (layout.channels + kSumColumns - 1) / kSumColumns};
  }
  return {layout.outer * ((layout.inner + kSumSegment - 1) / kSumSegment), layout.channels};
}

}  // namespace partune
