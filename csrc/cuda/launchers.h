// What the CUDA bindings call: every launcher of csrc/cuda/*.cuh, in plain C++. No launcher waits for
// the device.
#pragma once
#include <cuda_runtime_api.h>

#include "../kernels/block_lora_tasks.h"
#include "../kernels/csr_entries.h"
#include "../kernels/half_mask.h"
#include "../kernels/sampled_grad.h"
#include "../kernels/scale_shift_tasks.h"
#include "../kernels/sparse_adamw.h"

namespace partune {

// ---- family sparse_adamw ----

// Each takes a list of non-empty matrices of one combination of dtypes, in as few launches as
// parameters allow.
cudaError_t launch_sparse_adamw(SparseAdamWTypes types, const SparseAdamWDeviceStep<float>& step,
                                const SparseAdamWMatrix* matrices, int count, cudaStream_t stream);
cudaError_t launch_sparse_adamw_float64(const SparseAdamWDeviceStep<double>& step,
                                        const SparseAdamWMatrix* matrices, int count, cudaStream_t stream);

// Sets *found_inf to 1 if one of the gradients is not finite. `exponent` has the bits of their dtype's
// exponent, in an element of `bytes`.
cudaError_t launch_found_inf(int bytes, uint64_t exponent, const SparseAdamWMatrix* matrices, int count,
                             float* found_inf, cudaStream_t stream);

// Carries the values of the entries that both CSRs have; adds their number to *kept.
cudaError_t launch_remap(const CsrPair& csrs, const RemapValues* values, int count, int64_t* kept,
                         cudaStream_t stream);

// ---- family csr_entries ----

// Each takes a list of non-empty matrices of one combination of dtypes, in as few launches as
// parameters allow.
cudaError_t launch_gather_csr(CsrEntryTypes types, const MatrixEntries* matrices, int count,
                              cudaStream_t stream);
cudaError_t launch_scatter_csr(CsrEntryTypes types, const MatrixEntries* matrices, int count,
                               cudaStream_t stream);

// ---- family select ----

struct SelectTask {
  const void* scores;  // [rows, columns], or left [rows, rank]
  const void* right;   // [rank, columns], for factors
  int64_t rows, columns, rank;
  bool largest;
  bool threshold_given;  // then entries with a key above `threshold` are selected, and find isn't called
  uint64_t threshold;
  void* workspace;  // select_workspace_bytes of zeros, 16-byte aligned
  int64_t* crow_indices;
  int32_t* col_indices;
};

int64_t select_workspace_bytes(int64_t rows, int64_t columns);

// The parts of a selection, in this order: the key of the k-th best score; the rows' sizes, and so
// crow_indices; col_indices.
struct SelectLaunchers {
  cudaError_t (*find)(const SelectTask& task, int64_t k, cudaStream_t stream);
  cudaError_t (*count)(const SelectTask& task, cudaStream_t stream);
  cudaError_t (*emit)(const SelectTask& task, cudaStream_t stream);
};
extern const SelectLaunchers select_float64, select_float32, select_bfloat16, select_half;
extern const SelectLaunchers select_factors_float64, select_factors_float32;

// scores[i] is a uniform number of element i, for i < count.
cudaError_t launch_random_scores(float* scores, int64_t count, const int64_t* seed, const int64_t* step,
                                 uint32_t parameter_id, cudaStream_t stream);

// ---- family half_mask ----

// Each takes a list of non-empty matrices of one combination of dtypes and one level.
cudaError_t launch_half_adamw(SparseAdamWTypes types, const SparseAdamWDeviceStep<float>& step,
                              const int64_t* mask_seed, const HalfMatrix* matrices, int count,
                              cudaStream_t stream);
cudaError_t launch_half_adamw_float64(const SparseAdamWDeviceStep<double>& step, const int64_t* mask_seed,
                                      const HalfMatrix* matrices, int count, cudaStream_t stream);

// The packed mask of `count` entries, and the live entries of each tile of such a mask.
cudaError_t launch_random_mask(uint32_t* mask, int64_t count, const int64_t* mask_seed, uint32_t mask_id,
                               cudaStream_t stream);
cudaError_t launch_mask_counts(const uint32_t* mask, int64_t count, int64_t* counts, cudaStream_t stream);

// ---- family scale_shift ----

// How many rows of partial sums a backward leaves.
int64_t scale_shift_rows_of_sums(const ChannelLayout& layout);
// How many rows a block of a norm's backward has, of which it leaves one row of partial sums.
int64_t scale_shift_norm_block_rows(int64_t rows);

struct ScaleShiftLaunchers {
  cudaError_t (*forward)(const ScaleShiftTask& task, Activation activation, cudaStream_t stream);
  cudaError_t (*backward)(const ScaleShiftTask& task, Activation activation, cudaStream_t stream);
  cudaError_t (*sum_columns)(const ColumnSumsTask& task, cudaStream_t stream);
  cudaError_t (*norm_forward)(const NormTask& task, double eps, cudaStream_t stream);
  cudaError_t (*norm_backward)(const NormTask& task, cudaStream_t stream);
};
extern const ScaleShiftLaunchers scale_shift_float64, scale_shift_float32, scale_shift_bfloat16,
    scale_shift_half;

// ---- family block_lora ----

template <typename Real>
struct BlockLoraLaunchers {
  cudaError_t (*read)(const LoraRead<Real>& task, cudaStream_t stream);
  cudaError_t (*write)(const LoraWrite<Real>& task, cudaStream_t stream);
  cudaError_t (*sum)(const LoraSum<Real>& task, cudaStream_t stream);
  // How many parts a reading leaves of its products, and of how many tokens one of its sums is.
  int64_t (*column_tiles)(int64_t width);
  int64_t (*block_tokens)(int64_t tokens, int64_t width);
};
extern const BlockLoraLaunchers<double> block_lora_float64;
extern const BlockLoraLaunchers<float> block_lora_float32, block_lora_bfloat16, block_lora_half;

// ---- family sampled_grad ----

struct SampledGradTask {
  const void *grad, *input;  // [tokens, csr.rows], [tokens, columns]
  int64_t grad_stride, input_stride, tokens, columns;
  CsrView csr;
  void* values;  // [csr.nnz]
};

struct SampledGradLaunchers {
  int64_t (*workspace_bytes)(const SampledGradTask& task);
  // Adds all entries, by way of a workspace aligned to 16 bytes.
  cudaError_t (*sampled)(const SampledGradTask& task, void* workspace, cudaStream_t stream);
  cudaError_t (*blocks)(const SampledGradTask& task, void* workspace, cudaStream_t stream);
  // Adds the entries of rows [first_row, last_row), which panel holds.
  cudaError_t (*compact)(const SampledGradTask& task, const void* panel, int64_t first_row, int64_t last_row,
                         cudaStream_t stream);
};
extern const SampledGradLaunchers sampled_grad_float64, sampled_grad_float32, sampled_grad_bfloat16,
    sampled_grad_half;

}  // namespace partune
