// The CUDA kernels of family half_mask but float64's, in a translation unit of their own.
#include "half_mask.cuh"
#include "launchers.h"

namespace partune {

cudaError_t launch_half_adamw(SparseAdamWTypes types, const SparseAdamWDeviceStep<float>& step,
                              const int64_t* mask_seed, const HalfMatrix* matrices, int count,
                              cudaStream_t stream) {
  return with_step_types(types, [&](auto chosen) {
    using Types = decltype(chosen);
    return launch_half_step<typename Types::Weight, typename Types::Grad, typename Types::State>(
        step, mask_seed, matrices, count, stream);
  });
}

cudaError_t launch_random_mask(uint32_t* mask, int64_t count, const int64_t* mask_seed, uint32_t mask_id,
                               cudaStream_t stream) {
  const int64_t entries = int64_t{kHalfBlock} * kCounterEntries;
  const int64_t blocks = (count + entries - 1) / entries;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  return LAUNCH((random_mask_kernel<kHalfBlock>), dim3(unsigned(blocks)), dim3(kHalfBlock), 0, stream, mask,
                count, mask_seed, mask_id);
}

cudaError_t launch_mask_counts(const uint32_t* mask, int64_t count, int64_t* counts, cudaStream_t stream) {
  const int64_t tiles = (count + kHalfTile - 1) / kHalfTile;
  const int64_t blocks = (tiles + kHalfBlock / 32 - 1) / (kHalfBlock / 32);
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  return LAUNCH((mask_counts_kernel<kHalfBlock>), dim3(unsigned(blocks)), dim3(kHalfBlock), 0, stream, mask,
                count, tiles, counts);
}

}  // namespace partune
