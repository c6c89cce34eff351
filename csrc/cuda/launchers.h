// What the CUDA bindings call: every launcher of csrc/cuda/*.cuh, in plain C++.
#pragma once
#include <cuda_runtime_api.h>

#include "../kernels/sparse_adamw.h"

namespace partune {

// Steps a list of non-empty matrices that share their dtypes, in as few launches as parameters allow.
cudaError_t launch_sparse_adamw(SparseAdamWTypes types, const SparseAdamWDeviceStep& step,
                                const SparseAdamWMatrix* matrices, int count, cudaStream_t stream);

}  // namespace partune
