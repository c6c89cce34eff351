// Every CUDA kernel, in one translation unit free of torch: nvcc's cost is in headers and
// architectures, not in kernels.
#include "launchers.h"
#include "sparse_adamw.cuh"

namespace partune {

cudaError_t launch_sparse_adamw(SparseAdamWTypes types, const SparseAdamWDeviceStep& step,
                                const SparseAdamWMatrix* matrices, int count, cudaStream_t stream) {
  return launch_sparse_adamw_types(types, step, matrices, count, stream);
}

}  // namespace partune
