// Launchers of family half_mask: grid arithmetic, raw pointers and a stream.
#pragma once
#include "../kernels/half_mask.cuh"
#include "sparse_adamw.cuh"

namespace partune {

static_assert(kHalfTile == kEntriesPerBlock, "one count of blocks serves both families");

inline int64_t stepped_entries(const HalfMatrix& matrix) {
  const SparseAdamWMatrix& entries = matrix.entries;
  return matrix.level == kHalfElements ? entries.rows * entries.columns : entries.nnz;
}

template <typename Weight, typename Grad, typename State, typename Real>
cudaError_t launch_half_step(const SparseAdamWDeviceStep<Real>& step, const int64_t* mask_seed,
                             const HalfMatrix* matrices, int count, cudaStream_t stream) {
  HalfLaunch<Real> launch;
  launch.step = step;
  launch.mask_seed = mask_seed;
  const bool by_element = count > 0 && matrices[0].level == kHalfElements;
  const auto kernel = by_element ? half_elements_kernel<Weight, Grad, State, Real, kHalfBlock>
                                 : half_lines_kernel<Weight, Grad, State, Real, kHalfBlock>;
  for (int done = 0; done < count;) {
    const unsigned blocks = fill_batch(matrices, count, done, launch.batch);
    if (blocks == 0) return cudaErrorInvalidConfiguration;
    const cudaError_t error = LAUNCH(kernel, dim3(blocks), dim3(kHalfBlock), 0, stream, launch);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace partune
