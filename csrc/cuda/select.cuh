// Launchers of family select: grid arithmetic, raw pointers and a stream.
#pragma once
#include "../kernels/select.cuh"
#include "launchers.h"

namespace partune {

constexpr int kNarrowBlock = 1024;
constexpr int kScanBlock = 1024;
constexpr int kScanRowBlock = 128;
constexpr int kRandomBlock = 256;
// Enough blocks to fill a GPU; more would only have more counters to add up.
constexpr int64_t kHistogramBlocks = 1024;

inline int64_t tile_columns_of(int64_t columns) { return (columns + kTileColumns - 1) / kTileColumns; }

// How a selection's workspace is divided.
template <typename Key>
struct SelectWorkspace {
  SelectState<Key>* state;
  unsigned long long* bins;
  RowStart* row_starts;    // [rows]
  TileCount* tile_counts;  // [rows, tile columns]

  SelectWorkspace(void* memory, int64_t rows) {
    char* next = static_cast<char*>(memory);
    state = reinterpret_cast<SelectState<Key>*>(next);
    bins = reinterpret_cast<unsigned long long*>(next += sizeof(SelectState<uint64_t>));
    row_starts = reinterpret_cast<RowStart*>(next += kBins * sizeof(unsigned long long));
    tile_counts = reinterpret_cast<TileCount*>(next + rows * int64_t(sizeof(RowStart)));
  }
};

inline int64_t select_workspace_size(int64_t rows, int64_t columns) {
  return int64_t(sizeof(SelectState<uint64_t>) + kBins * sizeof(unsigned long long)) +
         rows * (int64_t(sizeof(RowStart)) + tile_columns_of(columns) * int64_t(sizeof(TileCount)));
}

template <typename Stored, typename Real>
void set_source(const SelectTask& task, StoredScores<Stored, Real>& source) {
  source = {static_cast<const Stored*>(task.scores), task.rows, task.columns};
}

template <typename Real>
void set_source(const SelectTask& task, FactorScores<Real>& source) {
  source = {static_cast<const Real*>(task.scores), static_cast<const Real*>(task.right), task.rows,
            task.columns, task.rank};
}

template <typename Source>
class Select {
  using Key = KeyFrom<Source>;
  static constexpr int kKeyBits = int(sizeof(Key)) * 8;
  static constexpr int kRows = kTileRows<typename Source::Score>;

 public:
  static cudaError_t find(const SelectTask& task, int64_t k, cudaStream_t stream) {
    const Select select(task);
    const int64_t blocks = select.tiles_ < kHistogramBlocks ? select.tiles_ : kHistogramBlocks;
    cudaError_t error = cudaSuccess;
    for (int left = kKeyBits; left > 0 && blocks > 0 && error == cudaSuccess;) {
      const int bits = left < kDigitBits ? left : kDigitBits;
      const Digit digit{left - bits, bits, left == kKeyBits};
      left -= bits;
      error = LAUNCH((select_histogram_kernel<Source, kSelectBlock>), dim3(unsigned(blocks)),
                     dim3(kSelectBlock), 0, stream, select.source_, select.tiles_, digit, task.largest,
                     select.workspace_.state, select.workspace_.bins);
      if (error != cudaSuccess) break;
      error = LAUNCH((select_narrow_kernel<Key, kNarrowBlock>), dim3(1), dim3(kNarrowBlock), 0, stream, digit,
                     k, select.workspace_.state, select.workspace_.bins);
    }
    return error;
  }

  static cudaError_t count(const SelectTask& task, cudaStream_t stream) {
    const Select select(task);
    const SelectWorkspace<Key>& workspace = select.workspace_;
    if (select.tiles_ > INT32_MAX) return cudaErrorInvalidConfiguration;
    if (select.tiles_ > 0) {
      cudaError_t error = LAUNCH((select_count_kernel<Source, kSelectBlock>), dim3(unsigned(select.tiles_)),
                                 dim3(kSelectBlock), 0, stream, select.source_, select.bound_, task.largest,
                                 workspace.tile_counts);
      if (error != cudaSuccess) return error;
      const int64_t scan_blocks = (task.rows + kScanRowBlock / 32 - 1) / (kScanRowBlock / 32);
      error = LAUNCH((select_scan_row_kernel<kScanRowBlock>), dim3(unsigned(scan_blocks)),
                     dim3(kScanRowBlock), 0, stream, workspace.tile_counts, workspace.row_starts, task.rows,
                     tile_columns_of(task.columns));
      if (error != cudaSuccess) return error;
    }
    return LAUNCH((select_scan_kernel<Key, kScanBlock>), dim3(1), dim3(kScanBlock), 0, stream,
                  workspace.row_starts, task.crow_indices, task.rows, select.bound_);
  }

  static cudaError_t emit(const SelectTask& task, cudaStream_t stream) {
    const Select select(task);
    if (select.tiles_ == 0) return cudaSuccess;
    return LAUNCH((select_emit_kernel<Source, kSelectBlock>), dim3(unsigned(select.tiles_)),
                  dim3(kSelectBlock), 0, stream, select.source_, select.bound_, task.largest,
                  select.workspace_.tile_counts, select.workspace_.row_starts, task.col_indices);
  }

  static constexpr SelectLaunchers launchers() noexcept { return {find, count, emit}; }

 private:
  explicit Select(const SelectTask& task) : workspace_(task.workspace, task.rows) {
    set_source(task, source_);
    bound_.found = task.threshold_given ? nullptr : workspace_.state;
    bound_.given = {Key(task.threshold), 0};
    tiles_ = (task.rows + kRows - 1) / kRows * tile_columns_of(task.columns);
  }

  Source source_;
  SelectWorkspace<Key> workspace_;
  SelectBound<Key> bound_;
  int64_t tiles_;
};

template <int kBlock>
cudaError_t launch_random(float* scores, int64_t count, const int64_t* seed, const int64_t* step,
                          uint32_t parameter_id, cudaStream_t stream) {
  const int64_t blocks = (count + int64_t{4} * kBlock - 1) / (int64_t{4} * kBlock);
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  return LAUNCH((random_scores_kernel<kBlock>), dim3(unsigned(blocks)), dim3(kBlock), 0, stream, scores,
                count, seed, step, parameter_id);
}

}  // namespace partune
