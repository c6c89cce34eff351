// Launchers of family sparse_adamw: grid arithmetic, raw pointers and a stream.
#pragma once
#include "../kernels/sparse_adamw.cuh"

namespace partune {

// Moves as many matrices as fit one launch into a batch, from matrices[done] on. Returns its blocks, or
// 0 where a matrix alone has more than a grid can.
inline unsigned fill_batch(const SparseAdamWMatrix* matrices, int count, int& done, SparseAdamWBatch& batch) {
  batch.count = 0;
  int64_t blocks = 0;
  for (; done < count && batch.count < kSparseAdamWMatrices; ++done) {
    const int64_t wanted = (matrices[done].nnz + kSparseAdamWTile - 1) / kSparseAdamWTile;
    if (blocks + wanted > INT32_MAX) break;
    batch.first_block[batch.count] = int(blocks);
    batch.matrices[batch.count++] = matrices[done];
    blocks += wanted;
  }
  batch.first_block[batch.count] = int(blocks);
  return unsigned(blocks);
}

template <typename Weight, typename Grad, typename State, typename Real>
cudaError_t launch_step(const SparseAdamWDeviceStep<Real>& step, const SparseAdamWMatrix* matrices, int count,
                        cudaStream_t stream) {
  SparseAdamWLaunch<Real> launch;
  launch.step = step;
  for (int done = 0; done < count;) {
    const unsigned blocks = fill_batch(matrices, count, done, launch.batch);
    if (blocks == 0) return cudaErrorInvalidConfiguration;
    const cudaError_t error = LAUNCH((sparse_adamw_kernel<Weight, Grad, State, Real, kSparseAdamWBlock>),
                                     dim3(blocks), dim3(kSparseAdamWBlock), 0, stream, launch);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <typename Word>
cudaError_t launch_found_inf_words(Word exponent, const SparseAdamWMatrix* matrices, int count,
                                   float* found_inf, cudaStream_t stream) {
  SparseAdamWBatch batch;
  for (int done = 0; done < count;) {
    const unsigned blocks = fill_batch(matrices, count, done, batch);
    if (blocks == 0) return cudaErrorInvalidConfiguration;
    const cudaError_t error = LAUNCH((found_inf_kernel<Word, kSparseAdamWBlock>), dim3(blocks),
                                     dim3(kSparseAdamWBlock), 0, stream, batch, exponent, found_inf);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <int kBlock>
cudaError_t launch_remap_values(const CsrPair& csrs, const RemapValues* values, int count, int64_t* kept,
                                cudaStream_t stream) {
  const int64_t blocks = (csrs.new_nnz + int64_t{4} * kBlock - 1) / (int64_t{4} * kBlock);
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  RemapLaunch launch;
  launch.csrs = csrs;
  launch.kept = reinterpret_cast<unsigned long long*>(kept);
  for (int done = 0; blocks > 0 && (done < count || launch.kept); launch.kept = nullptr) {
    launch.count = 0;
    while (done < count && launch.count < kRemapValues) launch.values[launch.count++] = values[done++];
    const cudaError_t error =
        LAUNCH((remap_kernel<kBlock>), dim3(unsigned(blocks)), dim3(kBlock), 0, stream, launch);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace partune
