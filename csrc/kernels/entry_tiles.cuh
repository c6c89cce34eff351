// How a list of matrices is divided among blocks: a block has a tile of consecutive entries of one
// matrix, a thread four of them.
#pragma once
#include "csr.h"
#include "kit.cuh"

namespace partune {

constexpr int kEntryBlock = 256;
constexpr int kEntriesPerBlock = kEntryBlock * 4;
constexpr size_t kLaunchParameterBytes = 32764;

template <typename Batch>
PARTUNE_FN int matrix_of_block(const Batch& batch, int block) {
  int first = 0, last = batch.count;
  while (first < last) {
    const int middle = first + (last - first + 1) / 2;
    if (batch.first_block[middle] <= block) {
      first = middle;
    } else {
      last = middle - 1;
    }
  }
  return first;
}

// A block's tile of entries, and where this thread's four of them begin.
template <int kBlock>
struct EntryTile {
  int64_t begin, end;
  int64_t position;
  int count;  // how many entries the tile has from there on: none, or more than the thread's four

  PARTUNE_MEMBER EntryTile(int block, int64_t nnz) {
    begin = int64_t(block) * 4 * kBlock;
    end = begin + int64_t{4} * kBlock < nnz ? begin + int64_t{4} * kBlock : nnz;
    position = begin + 4 * int64_t(threadIdx.x);
    count = int(end - position);
  }
};

// Two threads find the row in which a tile begins and the one in which the next tile does, which is
// `rows` at the end; a barrier must follow.
template <int kBlock>
PARTUNE_FN void find_tile_rows(const int64_t* crow_indices, int64_t rows, const EntryTile<kBlock>& tile,
                               int64_t (&tile_rows)[2]) {
  if (threadIdx.x < 2 && crow_indices) {
    tile_rows[threadIdx.x] = row_of(crow_indices, 0, rows, threadIdx.x == 0 ? tile.begin : tile.end);
  }
}

}  // namespace partune
