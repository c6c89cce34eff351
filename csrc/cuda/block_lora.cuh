// Launchers of family block_lora: grid arithmetic, raw pointers and a stream.
#pragma once
#include "../kernels/block_lora.cuh"
#include "launchers.h"

namespace partune {

// About as many blocks as fill a large GPU; with more, more sums would have to be added up.
constexpr int kLoraBlocks = 512;

template <typename Stored, typename Real>
class BlockLora {
 public:
  static constexpr BlockLoraLaunchers<Real> launchers() noexcept {
    return {read, write, sum, column_tiles, block_tokens};
  }

 private:
  using Tile = LoraTile<Stored>;

  static int64_t column_tiles(int64_t width) { return (width + Tile::kColumns - 1) / Tile::kColumns; }

  static int64_t block_tokens(int64_t tokens, int64_t width) {
    const int64_t share = tokens * column_tiles(width) / (int64_t{kLoraBlocks} * Tile::kTokens);
    return (share < 1 ? 1 : share > 8 ? 8 : share) * Tile::kTokens;
  }

  // Launches a kernel, unless there is nothing to do.
  template <typename... Parameters, typename... Arguments>
  static cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int64_t groups,
                            cudaStream_t stream, const Arguments&... arguments) {
    if (blocks == 0 || groups == 0) return cudaSuccess;
    if (blocks > INT32_MAX || groups > 65535) return cudaErrorInvalidConfiguration;
    return LAUNCH(kernel, dim3(unsigned(blocks), 1, unsigned(groups)), dim3(kLoraBlock), 0, stream,
                  arguments...);
  }

  template <bool kProducts, bool kSums, bool kDropout>
  static constexpr auto kReadKernel =
      block_lora_read_kernel<Stored, Real, kProducts, kSums, kDropout, kLoraBlock>;

  // The kernel that makes all that a task wants.
  static auto read_kernel(const LoraRead<Real>& task) {
    const bool dropout = task.x.seed != nullptr;
    if (task.products && task.sums) return kReadKernel<true, true, false>;
    if (task.products) return dropout ? kReadKernel<true, false, true> : kReadKernel<true, false, false>;
    return dropout ? kReadKernel<false, true, true> : kReadKernel<false, true, false>;
  }

  static cudaError_t read(const LoraRead<Real>& task, cudaStream_t stream) {
    if (task.products && task.sums && task.x.seed) return cudaErrorInvalidValue;
    const int64_t blocks = (task.x.tokens + task.block_tokens - 1) / task.block_tokens;
    return launch(read_kernel(task), blocks * column_tiles(task.x.width),
                  (task.thin.ranks + kLoraRanks - 1) / kLoraRanks, stream, task);
  }

  static cudaError_t write(const LoraWrite<Real>& task, cudaStream_t stream) {
    const int64_t rows = (task.out.tokens + Tile::kTokens - 1) / Tile::kTokens;
    const int64_t tiles = (task.out.width + Tile::kOutColumns - 1) / Tile::kOutColumns;
    const auto kernel = task.out.seed ? block_lora_write_kernel<Stored, Real, true, kLoraBlock>
                                      : block_lora_write_kernel<Stored, Real, false, kLoraBlock>;
    return launch(kernel, rows * tiles, 1, stream, task);
  }

  static cudaError_t sum(const LoraSum<Real>& task, cudaStream_t stream) {
    return launch(block_lora_sum_kernel<Real, kLoraBlock>,
                  (task.rows * task.columns + kLoraBlock - 1) / kLoraBlock, 1, stream, task);
  }
};

}  // namespace partune
