// Launchers of family sampled_grad: grid arithmetic, raw pointers and a stream.
#pragma once
#include "../kernels/sampled_grad.cuh"
#include "launchers.h"

namespace partune {

template <typename Stored, typename Real>
class SampledGrad {
 public:
  static int64_t workspace_bytes(const SampledGradTask& task) {
    return (task.csr.rows + task.columns) * kTokenBlock * int64_t(sizeof(Stored));
  }

  static cudaError_t sampled(const SampledGradTask& task, void* workspace, cudaStream_t stream) {
    return multiply(sampled_grad_kernel<Stored, Real, kSampledGradBlock>, kWarpEntries, task, workspace,
                    stream);
  }

  static cudaError_t blocks(const SampledGradTask& task, void* workspace, cudaStream_t stream) {
    return multiply(block_grad_kernel<Stored, Real, kSampledGradBlock>, kBlockSide * kBlockSide, task,
                    workspace, stream);
  }

  static cudaError_t compact(const SampledGradTask& task, const void* panel, int64_t first_row,
                             int64_t last_row, cudaStream_t stream) {
    return LAUNCH((compact_panel_kernel<Stored, Real, kSampledGradBlock>),
                  dim3(unsigned(last_row - first_row)), dim3(kSampledGradBlock), 0, stream,
                  static_cast<const Stored*>(panel), task.columns, first_row, task.csr,
                  static_cast<Real*>(task.values));
  }

  static constexpr SampledGradLaunchers launchers() noexcept {
    return {workspace_bytes, sampled, blocks, compact};
  }

 private:
  static constexpr int kTokens = kWarpTokens<Stored>;
  static_assert(kTokenBlock % kTokens == 0 && kTokens % kPackTokens == 0, "packed tokens are whole reads");

  using Kernel = void (*)(const Stored* grad, const Stored* input, int64_t tokens, CsrView csr, Real* values);

  // A block of tokens at a time: factors are packed, and `kernel` adds the entries, so many by a warp.
  static cudaError_t multiply(Kernel kernel, int64_t warp_entries, const SampledGradTask& task,
                              void* workspace, cudaStream_t stream) {
    Stored* grad = static_cast<Stored*>(workspace);
    Stored* input = grad + task.csr.rows * kTokenBlock;
    const int64_t block_entries = kSampledGradBlock / 32 * warp_entries;
    const int64_t blocks = (task.csr.nnz + block_entries - 1) / block_entries;
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    cudaError_t error = cudaSuccess;
    for (int64_t first = 0; first < task.tokens && error == cudaSuccess; first += kTokenBlock) {
      const int64_t left = task.tokens - first, tokens = left < kTokenBlock ? left : kTokenBlock;
      const int64_t padded = (tokens + kTokens - 1) / kTokens * kTokens;
      error = pack(task.grad, task.grad_stride, first, tokens, padded, task.csr.rows, grad, stream);
      if (error != cudaSuccess) break;
      error = pack(task.input, task.input_stride, first, tokens, padded, task.columns, input, stream);
      if (error != cudaSuccess) break;
      error = LAUNCH(kernel, dim3(unsigned(blocks)), dim3(kSampledGradBlock), 0, stream, grad, input, padded,
                     task.csr, static_cast<Real*>(task.values));
    }
    return error;
  }

  static cudaError_t pack(const void* factor, int64_t stride, int64_t first_token, int64_t tokens,
                          int64_t padded, int64_t columns, Stored* packed, cudaStream_t stream) {
    const dim3 grid(unsigned((columns + kPackColumns - 1) / kPackColumns), unsigned(padded / kPackTokens));
    return LAUNCH((pack_factor_kernel<Stored, kSampledGradBlock>), grid, dim3(kSampledGradBlock), 0, stream,
                  static_cast<const Stored*>(factor) + first_token * stride, stride, tokens, columns, packed);
  }
};

}  // namespace partune
