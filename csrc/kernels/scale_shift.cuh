// Family scale_shift on CUDA. A thread takes 16 bytes of neighbours at a time, or one. With channels last a
// warp has 32 such packs side by side and a block goes down the rows, its vectors in registers; with channels
// first a warp has neighbours of one channel. Backward, each block leaves two sums per channel, which
// a second kernel adds up in their order.
//
// Bytes moved: as scale_shift.h counts them, with blocks of kSumTileRows rows or kPlaneSegment neighbours.
#pragma once
#include "scale_shift_tasks.h"
#include "wide.cuh"

namespace partune {

constexpr int kScaleShiftBlock = 256;
constexpr int kSumTileRows = 32;
constexpr int kPlaneSegment = 4096;

// ---- vectors ----

template <typename Stored, typename Real>
PARTUNE_FN Real read_channel(const ChannelVector& vector, int64_t channel, Real missing) {
  if (!vector.data) return missing;
  if (vector.wide) return static_cast<const Real*>(vector.data)[channel];
  return widen(static_cast<const Stored*>(vector.data)[channel]);
}

// Real numbers of kPack neighbours' channels.
template <int kPack, typename Stored, typename Real>
struct PackVectors {
  Real addend[kPack], scale[kPack], shift[kPack];

  // Channels [channel, channel + kPack).
  PARTUNE_MEMBER void read(const ScaleShiftTask& task, int64_t channel) {
    PARTUNE_UNROLL
    for (int i = 0; i < kPack; ++i) read_one(task, channel + i, i);
  }

  // One channel, for the whole pack.
  PARTUNE_MEMBER void repeat(const ScaleShiftTask& task, int64_t channel) {
    read_one(task, channel, 0);
    PARTUNE_UNROLL
    for (int i = 1; i < kPack; ++i) {
      addend[i] = addend[0];
      scale[i] = scale[0];
      shift[i] = shift[0];
    }
  }

 private:
  PARTUNE_MEMBER void read_one(const ScaleShiftTask& task, int64_t channel, int i) {
    scale[i] = read_channel<Stored>(task.scale, channel, Real(1));
    shift[i] = read_channel<Stored>(task.shift, channel, Real(0));
    addend[i] = task.from_output ? -shift[i] : read_channel<Stored>(task.bias, channel, Real(0));
  }
};

// A pack at a position in memory, forward.
template <Activation kActivation, int kPack, typename Stored, typename Real>
PARTUNE_FN void forward_pack(const ScaleShiftTask& task, const PackVectors<kPack, Stored, Real>& vectors,
                             int64_t position) {
  Neighbours<Stored, kPack> pack = load_neighbours<kPack>(static_cast<const Stored*>(task.input) + position);
  PARTUNE_UNROLL
  for (int i = 0; i < kPack; ++i) {
    const Real y = scale_shift_element<kActivation>(widen(pack.at[i]), vectors.addend[i], vectors.scale[i],
                                                    vectors.shift[i]);
    round_nearest(y, pack.at[i]);
  }
  store_neighbours(pack, static_cast<Stored*>(task.output) + position);
}

// The same backward, its parts of the sums added to `along` and `plain`.
template <Activation kActivation, int kPack, typename Stored, typename Real>
PARTUNE_FN void backward_pack(const ScaleShiftTask& task, const PackVectors<kPack, Stored, Real>& vectors,
                              int64_t position, Real (&along)[kPack], Real (&plain)[kPack]) {
  Neighbours<Stored, kPack> pack = load_neighbours<kPack>(static_cast<const Stored*>(task.input) + position);
  Neighbours<Stored, kPack> saved = {};
  bool has_saved = true;
  if constexpr (kActivation == Activation::kNone) has_saved = task.saved != nullptr;
  if (has_saved) saved = load_neighbours<kPack>(static_cast<const Stored*>(task.saved) + position);
  PARTUNE_UNROLL
  for (int i = 0; i < kPack; ++i) {
    const InnerGrad<Real> inner = inner_grad<kActivation>(
        widen(pack.at[i]), widen(saved.at[i]), vectors.addend[i], vectors.scale[i], vectors.shift[i]);
    along[i] = multiply_add(inner.grad, inner.factor, along[i]);
    plain[i] += inner.grad;
    round_nearest(multiply(inner.grad, vectors.scale[i]), pack.at[i]);
  }
  if (task.output) store_neighbours(pack, static_cast<Stored*>(task.output) + position);
}

// Which rows and columns of [rows, channels] a thread has: a pack of each kLanes-th row of a tile.
template <int kPack, int kBlock>
struct RowTile {
  static constexpr int kLanes = kBlock / 32;
  static constexpr int kColumns = 32 * kPack;
  int64_t tile, first_column, column;
  int64_t position, end, step;  // of the packs in memory; none where the column is out of range

  PARTUNE_MEMBER explicit RowTile(const ChannelLayout& layout) {
    // No more tiles than blocks, which 32 bits count.
    const unsigned tiles = unsigned((layout.channels + kColumns - 1) / kColumns);
    tile = blockIdx.x / tiles;
    first_column = int64_t(blockIdx.x % tiles) * kColumns;
    column = first_column + int64_t(threadIdx.x % 32) * kPack;
    const int64_t end_row = (tile + 1) * kSumTileRows;
    position = (tile * kSumTileRows + threadIdx.x / 32) * layout.channels + column;
    end = column < layout.channels ? (end_row < layout.outer ? end_row : layout.outer) * layout.channels : 0;
    step = kLanes * layout.channels;
  }
};

// Which neighbours of one channel a thread has: a pack of each 32 of its warp's segment.
template <int kPack, int kBlock>
struct PlaneSegment {
  int64_t sum_row, channel;
  int64_t position, end;  // of the packs in memory
  bool exists;

  PARTUNE_MEMBER explicit PlaneSegment(const ChannelLayout& layout) {
    const int64_t segments = (layout.inner + kPlaneSegment - 1) / kPlaneSegment;
    const int64_t unit = int64_t(blockIdx.x) * (kBlock / 32) + threadIdx.x / 32;
    sum_row = unit / layout.channels;
    channel = unit % layout.channels;
    const int64_t start = sum_row % segments * kPlaneSegment, outer = sum_row / segments;
    const int64_t stop = start + kPlaneSegment < layout.inner ? start + kPlaneSegment : layout.inner;
    const int64_t line = (outer * layout.channels + channel) * layout.inner;
    exists = outer < layout.outer;
    position = line + start + int64_t(threadIdx.x % 32) * kPack;
    end = exists ? line + stop : 0;
  }
};

// ---- forward ----

// Packs are of kPackSize neighbours where lines and addresses let all of them be whole, else of one.
// Of float64 two blocks on a multiprocessor are enough: for more of them ptxas spills GELU on sm_80.
// SASS <float, float, 4>: LDG.E.128, STG.E.128
// SASS <BFloat16, float, 8>: LDG.E.128, STG.E.128
template <typename Stored, typename Real, int kPack, Activation kActivation, int kBlock>
__global__ void __launch_bounds__(kBlock, sizeof(Real) == 8 ? 2 : 0)
    scale_shift_rows_kernel(const ScaleShiftTask task) {
  const RowTile<kPack, kBlock> tile(task.layout);
  if (tile.position < tile.end) {
    PackVectors<kPack, Stored, Real> vectors;
    vectors.read(task, tile.column);
    for (int64_t position = tile.position; position < tile.end; position += tile.step) {
      forward_pack<kActivation>(task, vectors, position);
    }
  }
}

// SASS <float, float, 4>: LDG.E.128, STG.E.128
// SASS <BFloat16, float, 8>: LDG.E.128, STG.E.128
template <typename Stored, typename Real, int kPack, Activation kActivation, int kBlock>
__global__ void __launch_bounds__(kBlock) scale_shift_planes_kernel(const ScaleShiftTask task) {
  const PlaneSegment<kPack, kBlock> segment(task.layout);
  PackVectors<kPack, Stored, Real> vectors;
  vectors.repeat(task, segment.channel);
  for (int64_t position = segment.position; position < segment.end; position += int64_t{32} * kPack) {
    forward_pack<kActivation>(task, vectors, position);
  }
}

// ---- backward ----

// SASS <float, float, 4>: LDG.E.128 x2, STG.E.128
// SASS <BFloat16, float, 8>: LDG.E.128 x2, STG.E.128
template <typename Stored, typename Real, int kPack, Activation kActivation, int kBlock>
__global__ void __launch_bounds__(kBlock) scale_shift_backward_rows_kernel(const ScaleShiftTask task) {
  constexpr int kLanes = kBlock / 32;
  SHARED(Real, sums, [kLanes][2][32 * kPack]);
  const RowTile<kPack, kBlock> tile(task.layout);
  Real along[kPack] = {}, plain[kPack] = {};
  if (tile.position < tile.end) {
    PackVectors<kPack, Stored, Real> vectors;
    vectors.read(task, tile.column);
#pragma unroll 1
    for (int64_t position = tile.position; position < tile.end; position += tile.step) {
      backward_pack<kActivation>(task, vectors, position, along, plain);
    }
  }
  PARTUNE_UNROLL
  for (int i = 0; i < kPack; ++i) {
    sums[threadIdx.x / 32][0][threadIdx.x % 32 * kPack + i] = along[i];
    sums[threadIdx.x / 32][1][threadIdx.x % 32 * kPack + i] = plain[i];
  }
  __syncthreads();
  if (task.partial) {
    const int64_t channels = task.layout.channels;
    Real* partial = static_cast<Real*>(task.partial) + tile.tile * 2 * channels + tile.first_column;
    for (int i = int(threadIdx.x); i < 2 * 32 * kPack; i += kBlock) {
      const int which = i / (32 * kPack), column = i % (32 * kPack);
      Real sum = sums[0][which][column];
      PARTUNE_UNROLL
      for (int lane = 1; lane < kLanes; ++lane) sum += sums[lane][which][column];
      if (tile.first_column + column < channels) partial[which * channels + column] = sum;
    }
  }
}

// SASS <float, float, 4>: LDG.E.128 x2, STG.E.128
// SASS <BFloat16, float, 8>: LDG.E.128 x2, STG.E.128
template <typename Stored, typename Real, int kPack, Activation kActivation, int kBlock>
__global__ void __launch_bounds__(kBlock) scale_shift_backward_planes_kernel(const ScaleShiftTask task) {
  const PlaneSegment<kPack, kBlock> segment(task.layout);
  Real along[kPack] = {}, plain[kPack] = {};
  PackVectors<kPack, Stored, Real> vectors;
  vectors.repeat(task, segment.channel);
#pragma unroll 1
  for (int64_t position = segment.position; position < segment.end; position += int64_t{32} * kPack) {
    backward_pack<kActivation>(task, vectors, position, along, plain);
  }
  PARTUNE_UNROLL
  for (int i = 1; i < kPack; ++i) {
    along[0] += along[i];
    plain[0] += plain[i];
  }
  PARTUNE_UNROLL
  for (int step = 16; step >= 1; step /= 2) {
    along[0] += __shfl_xor_sync(0xffffffffu, along[0], step);
    plain[0] += __shfl_xor_sync(0xffffffffu, plain[0], step);
  }
  if (task.partial && segment.exists && threadIdx.x % 32 == 0) {
    Real* partial = static_cast<Real*>(task.partial) + segment.sum_row * 2 * task.layout.channels;
    partial[segment.channel] = along[0];
    partial[task.layout.channels + segment.channel] = plain[0];
  }
}

// ---- the sum of the partial sums ----

// A warp has 32 channels and every kBlock/32-th row.
// SASS: none (neighbours in a warp read neighbours, four bytes a thread, of what the caches hold)
template <typename Stored, typename Real, int kBlock>
__global__ void __launch_bounds__(kBlock) scale_shift_sums_kernel(const ColumnSumsTask task) {
  constexpr int kLanes = kBlock / 32;
  SHARED(Real, sums, [kLanes][2][32]);
  const int lane = int(threadIdx.x) / 32, column = int(threadIdx.x) % 32;
  const int64_t channel = int64_t(blockIdx.x) * 32 + column;
  Real along = 0, plain = 0;
  if (channel < task.channels) {
    for (int64_t row = lane; row < task.rows; row += kLanes) {
      const Real* partial = static_cast<const Real*>(task.partial) + row * 2 * task.channels;
      along += partial[channel];
      plain += partial[task.channels + channel];
    }
  }
  sums[lane][0][column] = along;
  sums[lane][1][column] = plain;
  __syncthreads();
  if (lane == 0 && channel < task.channels) {
    PARTUNE_UNROLL
    for (int other = 1; other < kLanes; ++other) {
      along += sums[other][0][column];
      plain += sums[other][1][column];
    }
    along = multiply(along, read_channel<Stored>(task.factor, channel, Real(1)));
    along = multiply_add(plain, read_channel<Stored>(task.offset, channel, Real(0)), along);
    along = divide(along, read_channel<Stored>(task.divisor, channel, Real(1)));
    if (task.wide) {
      static_cast<Real*>(task.grad_scale)[channel] = along;
      static_cast<Real*>(task.grad_shift)[channel] = plain;
    } else {
      round_nearest(along, static_cast<Stored*>(task.grad_scale)[channel]);
      round_nearest(plain, static_cast<Stored*>(task.grad_shift)[channel]);
    }
  }
}

}  // namespace partune
