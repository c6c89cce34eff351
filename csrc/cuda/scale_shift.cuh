// Launchers of family scale_shift: grid arithmetic, raw pointers and a stream.
#pragma once
#include "../kernels/scale_shift.cuh"
#include "../kernels/scale_shift_norm.cuh"
#include "launchers.h"

namespace partune {

// Shared memory that every architecture has without asking.
constexpr int64_t kNormSharedBytes = int64_t{40} << 10;

inline int64_t count_rows_of_sums(const ChannelLayout& layout) {
  if (layout.inner == 1) return (layout.outer + kSumTileRows - 1) / kSumTileRows;
  return layout.outer * ((layout.inner + kPlaneSegment - 1) / kPlaneSegment);
}

// Enough blocks to fill a GPU; more would only have more sums to add up.
inline int64_t rows_of_norm_block(int64_t rows) {
  const int64_t share = (rows + 511) / 512;
  return share < 8 ? 8 : share;
}

template <typename Stored, typename Real>
class ScaleShift {
 public:
  static constexpr ScaleShiftLaunchers launchers() noexcept {
    return {forward, backward, sum_columns, norm_forward, norm_backward};
  }

 private:
  static int64_t blocks_of(const ChannelLayout& layout) {
    if (layout.inner == 1) {
      constexpr int64_t kColumns = 32 * kPackSize<Stored>;
      return count_rows_of_sums(layout) * ((layout.channels + kColumns - 1) / kColumns);
    }
    constexpr int64_t kWarps = kScaleShiftBlock / 32;
    return (count_rows_of_sums(layout) * layout.channels + kWarps - 1) / kWarps;
  }

  // Launches a kernel, unless there is nothing to do.
  template <int kBlock, typename... Parameters, typename... Arguments>
  static cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, size_t shared, cudaStream_t stream,
                            const Arguments&... arguments) {
    if (blocks == 0) return cudaSuccess;
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    return LAUNCH(kernel, dim3(unsigned(blocks)), dim3(kBlock), shared, stream, arguments...);
  }

  template <Activation kActivation>
  static cudaError_t forward_of(const ScaleShiftTask& task, cudaStream_t stream) {
    return launch<kScaleShiftBlock>(
        task.layout.inner == 1 ? scale_shift_rows_kernel<Stored, Real, kActivation, kScaleShiftBlock>
                               : scale_shift_planes_kernel<Stored, Real, kActivation, kScaleShiftBlock>,
        blocks_of(task.layout), 0, stream, task);
  }

  static cudaError_t forward(const ScaleShiftTask& task, Activation activation, cudaStream_t stream) {
    switch (activation) {
      case Activation::kGelu:
        return forward_of<Activation::kGelu>(task, stream);
      case Activation::kGeluTanh:
        return forward_of<Activation::kGeluTanh>(task, stream);
      case Activation::kNone:
        break;
    }
    return forward_of<Activation::kNone>(task, stream);
  }

  template <Activation kActivation>
  static cudaError_t backward_of(const ScaleShiftTask& task, cudaStream_t stream) {
    return launch<kScaleShiftBlock>(
        task.layout.inner == 1
            ? scale_shift_backward_rows_kernel<Stored, Real, kActivation, kScaleShiftBlock>
            : scale_shift_backward_planes_kernel<Stored, Real, kActivation, kScaleShiftBlock>,
        blocks_of(task.layout), 0, stream, task);
  }

  static cudaError_t backward(const ScaleShiftTask& task, Activation activation, cudaStream_t stream) {
    switch (activation) {
      case Activation::kGelu:
        return backward_of<Activation::kGelu>(task, stream);
      case Activation::kGeluTanh:
        return backward_of<Activation::kGeluTanh>(task, stream);
      case Activation::kNone:
        break;
    }
    return backward_of<Activation::kNone>(task, stream);
  }

  static cudaError_t sum_columns(const ColumnSumsTask& task, cudaStream_t stream) {
    return launch<kScaleShiftBlock>(scale_shift_sums_kernel<Stored, Real, kScaleShiftBlock>,
                                    (task.channels + 31) / 32, 0, stream, task);
  }

  static cudaError_t norm_forward(const NormTask& task, double eps, cudaStream_t stream) {
    return launch<kNormBlock>(norm_scale_shift_kernel<Stored, Real, kNormBlock>, task.rows, 0, stream, task,
                              Real(eps));
  }

  static cudaError_t norm_backward(const NormTask& task, cudaStream_t stream) {
    NormTask placed = task;
    const int64_t bytes = 2 * task.channels * int64_t(sizeof(Real));
    placed.shared_sums = task.partial && bytes <= kNormSharedBytes;
    return launch<kNormBlock>(norm_scale_shift_backward_kernel<Stored, Real, kNormBlock>,
                              (task.rows + task.block_rows - 1) / task.block_rows,
                              placed.shared_sums ? size_t(bytes) : 0, stream, placed);
  }
};

}  // namespace partune
