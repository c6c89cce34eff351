// From a list of matrices to launches.
#pragma once
#include "../kernels/entry_tiles.cuh"

namespace partune {

// Moves as many matrices as fit one launch into a batch, from matrices[done] on. Returns its blocks, or
// 0 where a matrix alone has more than a grid can.
template <typename Matrix, typename Batch>
unsigned fill_batch(const Matrix* matrices, int count, int& done, Batch& batch) {
  constexpr int kMatrices = sizeof(batch.matrices) / sizeof(batch.matrices[0]);
  batch.count = 0;
  int64_t blocks = 0;
  for (; done < count && batch.count < kMatrices; ++done) {
    const int64_t wanted = (stepped_entries(matrices[done]) + kEntriesPerBlock - 1) / kEntriesPerBlock;
    if (blocks + wanted > INT32_MAX) break;
    batch.first_block[batch.count] = int(blocks);
    batch.matrices[batch.count++] = matrices[done];
    blocks += wanted;
  }
  batch.first_block[batch.count] = int(blocks);
  return unsigned(blocks);
}

}  // namespace partune
