// Family sampled_grad's CUDA kernels but float64's.
#include "launchers.h"
#include "sampled_grad.cuh"

namespace partune {

const SampledGradLaunchers sampled_grad_float32 = SampledGrad<float, float>::launchers();
const SampledGradLaunchers sampled_grad_bfloat16 = SampledGrad<BFloat16, float>::launchers();
const SampledGradLaunchers sampled_grad_half = SampledGrad<Half, float>::launchers();

}  // namespace partune
