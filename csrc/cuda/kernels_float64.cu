// The float64 kernels, in a translation unit of their own: everywhere else a double is a mistake that
// fails the build.
#include "half_mask.cuh"
#include "launchers.h"
#include "sampled_grad.cuh"
#include "scale_shift.cuh"
#include "select.cuh"
#include "sparse_adamw.cuh"

namespace partune {

cudaError_t launch_sparse_adamw_float64(const SparseAdamWDeviceStep<double>& step,
                                        const SparseAdamWMatrix* matrices, int count, cudaStream_t stream) {
  return launch_step<double, double, double>(step, matrices, count, stream);
}

const SelectLaunchers select_float64 = Select<StoredScores<double, double>>::launchers();
const SelectLaunchers select_factors_float64 = Select<FactorScores<double>>::launchers();

cudaError_t launch_half_adamw_float64(const SparseAdamWDeviceStep<double>& step, const int64_t* mask_seed,
                                      const HalfMatrix* matrices, int count, cudaStream_t stream) {
  return launch_half_step<double, double, double>(step, mask_seed, matrices, count, stream);
}

const ScaleShiftLaunchers scale_shift_float64 = ScaleShift<double, double>::launchers();

const SampledGradLaunchers sampled_grad_float64 = SampledGrad<double, double>::launchers();

}  // namespace partune
