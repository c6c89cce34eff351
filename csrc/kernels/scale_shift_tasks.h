// What the CUDA kernels of family scale_shift are told: raw pointers and sizes.
#pragma once
#include "scale_shift.h"

namespace partune {

// [channels], stored as the tensor is or, where that is narrower, in the computing type.
struct ChannelVector {
  const void* data;  // null: none
  bool wide;
};

// What a forward or a backward needs.
struct ScaleShiftTask {
  ChannelLayout layout;
  const void* input;  // or the output's gradient
  const void* saved;  // backward; null: not needed
  void* output;       // or the input's gradient; null: not wanted
  ChannelVector bias, scale, shift;
  bool from_output;  // `saved` is the output
  void* partial;     // [rows of sums, 2, channels]; null: not wanted
};

// scale's gradient is (sum 0·factor + sum 1·offset)/divisor.
struct ColumnSumsTask {
  const void* partial;  // [rows, 2, channels]
  int64_t rows, channels;
  ChannelVector factor, offset, divisor;
  void *grad_scale, *grad_shift;  // [channels]
  bool wide;                      // the two have the computing type, not the stored one
};

// A norm's forward or backward.
struct NormTask {
  int64_t rows, channels;
  const void* input;
  const void* grad;  // backward
  void* output;      // or the input's gradient; null: not wanted
  ChannelVector weight, bias, scale, shift;
  void *mean, *rstd;   // [rows], written forward, read backward; no mean: RMSNorm
  int64_t block_rows;  // backward: rows of a block
  void* partial;       // [blocks, 2, channels]; null: not wanted
  bool shared_sums;    // partial sums are wanted, and shared memory has room for 2·channels numbers
};

}  // namespace partune
