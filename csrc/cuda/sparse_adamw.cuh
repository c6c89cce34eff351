// Launchers of family sparse_adamw: grid arithmetic, raw pointers and a stream.
#pragma once
#include "../kernels/sparse_adamw.cuh"
#include "fill_batch.cuh"

namespace partune {

inline int64_t stepped_entries(const SparseAdamWMatrix& matrix) { return matrix.nnz; }

template <typename Weight, typename Grad, typename State, typename Real>
cudaError_t launch_step(const SparseAdamWDeviceStep<Real>& step, const SparseAdamWMatrix* matrices, int count,
                        cudaStream_t stream) {
  SparseAdamWLaunch<Real> launch;
  launch.step = step;
  for (int done = 0; done < count;) {
    const unsigned blocks = fill_batch(matrices, count, done, launch.batch);
    if (blocks == 0) return cudaErrorInvalidConfiguration;
    const cudaError_t error = LAUNCH((sparse_adamw_kernel<Weight, Grad, State, Real, kEntryBlock>),
                                     dim3(blocks), dim3(kEntryBlock), 0, stream, launch);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// The types of weights, gradients and moments that a launch is built for.
template <typename WeightType, typename GradType, typename StateType>
struct StepTypes {
  using Weight = WeightType;
  using Grad = GradType;
  using State = StateType;
};

// launch(StepTypes) of a combination; float64's has a translation unit of its own.
template <typename Launch>
cudaError_t with_step_types(SparseAdamWTypes types, const Launch& launch) {
  switch (types) {
    case kFloat32:
      return launch(StepTypes<float, float, float>());
    case kFloat32StateBFloat16:
      return launch(StepTypes<float, float, BFloat16>());
    case kBFloat16:
      return launch(StepTypes<BFloat16, BFloat16, float>());
    case kBFloat16StateBFloat16:
      return launch(StepTypes<BFloat16, BFloat16, BFloat16>());
    case kBFloat16GradFloat32:
      return launch(StepTypes<BFloat16, float, float>());
    case kBFloat16GradFloat32StateBFloat16:
      return launch(StepTypes<BFloat16, float, BFloat16>());
    case kHalf:
      return launch(StepTypes<Half, Half, float>());
    case kHalfStateBFloat16:
      return launch(StepTypes<Half, Half, BFloat16>());
    case kHalfGradFloat32:
      return launch(StepTypes<Half, float, float>());
    case kHalfGradFloat32StateBFloat16:
      return launch(StepTypes<Half, float, BFloat16>());
    case kFloat64:
    case kSparseAdamWTypesCount:
      break;
  }
  return cudaErrorNotSupported;
}

template <typename Word>
cudaError_t launch_found_inf_words(Word exponent, const SparseAdamWMatrix* matrices, int count,
                                   float* found_inf, cudaStream_t stream) {
  SparseAdamWBatch batch;
  for (int done = 0; done < count;) {
    const unsigned blocks = fill_batch(matrices, count, done, batch);
    if (blocks == 0) return cudaErrorInvalidConfiguration;
    const cudaError_t error = LAUNCH((found_inf_kernel<Word, kEntryBlock>), dim3(blocks), dim3(kEntryBlock),
                                     0, stream, batch, exponent, found_inf);
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
