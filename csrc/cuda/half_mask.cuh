// Launchers of family half_mask: grid arithmetic, raw pointers and a stream.
#pragma once
#include "../kernels/half_mask.cuh"

namespace partune {

// Moves as many matrices as fit one launch into a batch, from matrices[done] on. Returns its blocks, or
// 0 where a matrix alone has more than a grid can.
inline unsigned fill_half_batch(const HalfMatrix* matrices, int count, int& done, HalfBatch& batch) {
  batch.count = 0;
  int64_t blocks = 0;
  for (; done < count && batch.count < kHalfMatrices; ++done) {
    const HalfMatrix& m = matrices[done];
    const int64_t stepped = m.level == kHalfElements ? m.entries.rows * m.entries.columns : m.entries.nnz;
    const int64_t wanted = (stepped + kHalfTile - 1) / kHalfTile;
    if (blocks + wanted > INT32_MAX) break;
    batch.first_block[batch.count] = int(blocks);
    batch.matrices[batch.count++] = m;
    blocks += wanted;
  }
  batch.first_block[batch.count] = int(blocks);
  return unsigned(blocks);
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
    const unsigned blocks = fill_half_batch(matrices, count, done, launch.batch);
    if (blocks == 0) return cudaErrorInvalidConfiguration;
    const cudaError_t error = LAUNCH(kernel, dim3(blocks), dim3(kHalfBlock), 0, stream, launch);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace partune
