// Every CUDA kernel but float64's, in one translation unit free of torch: nvcc's cost is in headers and
// architectures, not in kernels.
#include "csr_entries.cuh"
#include "launchers.h"
#include "select.cuh"
#include "sparse_adamw.cuh"

namespace partune {

cudaError_t launch_sparse_adamw(SparseAdamWTypes types, const SparseAdamWDeviceStep<float>& step,
                                const SparseAdamWMatrix* matrices, int count, cudaStream_t stream) {
  return with_step_types(types, [&](auto chosen) {
    using Types = decltype(chosen);
    return launch_step<typename Types::Weight, typename Types::Grad, typename Types::State>(step, matrices,
                                                                                            count, stream);
  });
}

cudaError_t launch_found_inf(int bytes, uint64_t exponent, const SparseAdamWMatrix* matrices, int count,
                             float* found_inf, cudaStream_t stream) {
  switch (bytes) {
    case 8:
      return launch_found_inf_words<uint64_t>(exponent, matrices, count, found_inf, stream);
    case 4:
      return launch_found_inf_words<uint32_t>(uint32_t(exponent), matrices, count, found_inf, stream);
    default:
      return launch_found_inf_words<uint16_t>(uint16_t(exponent), matrices, count, found_inf, stream);
  }
}

cudaError_t launch_remap(const CsrPair& csrs, const RemapValues* values, int count, int64_t* kept,
                         cudaStream_t stream) {
  return launch_remap_values<kEntryBlock>(csrs, values, count, kept, stream);
}

cudaError_t launch_gather_csr(CsrEntryTypes types, const MatrixEntries* matrices, int count,
                              cudaStream_t stream) {
  return with_entry_types(types, [&](auto chosen) {
    using Types = decltype(chosen);
    return launch_csr_entries(gather_csr_kernel<typename Types::Stored, typename Types::Value, kEntryBlock>,
                              matrices, count, stream);
  });
}

cudaError_t launch_scatter_csr(CsrEntryTypes types, const MatrixEntries* matrices, int count,
                               cudaStream_t stream) {
  return with_entry_types(types, [&](auto chosen) {
    using Types = decltype(chosen);
    return launch_csr_entries(scatter_csr_kernel<typename Types::Stored, typename Types::Value, kEntryBlock>,
                              matrices, count, stream);
  });
}

int64_t select_workspace_bytes(int64_t rows, int64_t columns) { return select_workspace_size(rows, columns); }

const SelectLaunchers select_float32 = Select<StoredScores<float, float>>::launchers();
const SelectLaunchers select_bfloat16 = Select<StoredScores<BFloat16, float>>::launchers();
const SelectLaunchers select_half = Select<StoredScores<Half, float>>::launchers();
const SelectLaunchers select_factors_float32 = Select<FactorScores<float>>::launchers();

cudaError_t launch_random_scores(float* scores, int64_t count, const int64_t* seed, const int64_t* step,
                                 uint32_t parameter_id, cudaStream_t stream) {
  return launch_random<kRandomBlock>(scores, count, seed, step, parameter_id, stream);
}

}  // namespace partune
