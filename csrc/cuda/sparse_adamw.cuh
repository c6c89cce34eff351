// Launcher of family sparse_adamw: grid arithmetic, raw pointers and a stream.
#pragma once
#include "../kernels/sparse_adamw.cuh"

namespace partune {

template <typename Weight, typename Grad, typename State>
cudaError_t launch_sparse_adamw(const SparseAdamWDeviceStep& step, const SparseAdamWMatrix* matrices,
                                int count, cudaStream_t stream) {
  SparseAdamWLaunch launch;
  launch.step = step;
  for (int done = 0; done < count;) {
    launch.count = 0;
    int64_t blocks = 0;
    for (; done < count && launch.count < kSparseAdamWMatrices; ++done) {
      const int64_t wanted = (matrices[done].nnz + kSparseAdamWTile - 1) / kSparseAdamWTile;
      if (blocks + wanted > INT32_MAX) break;
      launch.first_block[launch.count] = int(blocks);
      launch.matrices[launch.count++] = matrices[done];
      blocks += wanted;
    }
    if (launch.count == 0) return cudaErrorInvalidConfiguration;
    launch.first_block[launch.count] = int(blocks);
    const cudaError_t error = LAUNCH((sparse_adamw_kernel<Weight, Grad, State, kSparseAdamWBlock>),
                                     dim3(unsigned(blocks)), dim3(kSparseAdamWBlock), 0, stream, launch);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

inline cudaError_t launch_sparse_adamw_types(SparseAdamWTypes types, const SparseAdamWDeviceStep& step,
                                             const SparseAdamWMatrix* matrices, int count,
                                             cudaStream_t stream) {
  switch (types) {
    case kFloat32:
      return launch_sparse_adamw<float, float, float>(step, matrices, count, stream);
    case kFloat32StateBFloat16:
      return launch_sparse_adamw<float, float, BFloat16>(step, matrices, count, stream);
    case kBFloat16:
      return launch_sparse_adamw<BFloat16, BFloat16, float>(step, matrices, count, stream);
    case kBFloat16StateBFloat16:
      return launch_sparse_adamw<BFloat16, BFloat16, BFloat16>(step, matrices, count, stream);
    case kBFloat16GradFloat32:
      return launch_sparse_adamw<BFloat16, float, float>(step, matrices, count, stream);
    case kBFloat16GradFloat32StateBFloat16:
      return launch_sparse_adamw<BFloat16, float, BFloat16>(step, matrices, count, stream);
    case kHalf:
      return launch_sparse_adamw<Half, Half, float>(step, matrices, count, stream);
    case kHalfStateBFloat16:
      return launch_sparse_adamw<Half, Half, BFloat16>(step, matrices, count, stream);
    case kHalfGradFloat32:
      return launch_sparse_adamw<Half, float, float>(step, matrices, count, stream);
    case kHalfGradFloat32StateBFloat16:
      return launch_sparse_adamw<Half, float, BFloat16>(step, matrices, count, stream);
    case kFloat64:
    case kSparseAdamWTypesCount:
      break;
  }
  return cudaErrorNotSupported;
}

}  // namespace partune
