// Family scale_shift on CUDA. A thread takes 16 bytes of neighbours at a time. With channels last a warp
// has 32 such packs side by side and a block goes down the rows, its vectors in registers; with channels
// first a warp has neighbours of one channel. Backward, each block leaves two sums per channel, which
// a second kernel adds up in their order.
//
// Bytes moved: as scale_shift.h counts them, with blocks of kSumTileRows rows or kPlaneSegment neighbours.
#pragma once
#include "kit.cuh"
#include "scale_shift_tasks.h"

namespace partune {

constexpr int kScaleShiftBlock = 256;
constexpr int kSumTileRows = 32;
constexpr int kPlaneSegment = 4096;

template <typename T>
constexpr int kPackSize = 16 / int(sizeof(T));

// 16 bytes of neighbours.
template <typename T>
struct alignas(16) WidePack {
  T at[kPackSize<T>];
};

template <typename T>
PARTUNE_FN WidePack<T> load_wide(const T* from, int64_t count, bool aligned) {
  WidePack<T> pack = {};
  if (aligned && count >= kPackSize<T>) return *reinterpret_cast<const WidePack<T>*>(from);
  PARTUNE_UNROLL
  for (int i = 0; i < kPackSize<T>; ++i) {
    if (i < count) pack.at[i] = from[i];
  }
  return pack;
}

template <typename T>
PARTUNE_FN void store_wide(const WidePack<T>& pack, T* to, int64_t count, bool aligned) {
  if (aligned && count >= kPackSize<T>) {
    uint4 words;
    __builtin_memcpy(&words, &pack, sizeof words);
    __stcg(reinterpret_cast<uint4*>(to), words);  // the compiler stores an assigned struct in parts
    return;
  }
  PARTUNE_UNROLL
  for (int i = 0; i < kPackSize<T>; ++i) {
    if (i < count) to[i] = pack.at[i];
  }
}

template <typename T>
PARTUNE_FN bool is_wide_aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// ---- vectors ----

template <typename Stored, typename Real>
PARTUNE_FN Real read_channel(const ChannelVector& vector, int64_t channel, Real missing) {
  if (!vector.data) return missing;
  if (vector.wide) return static_cast<const Real*>(vector.data)[channel];
  return widen(static_cast<const Stored*>(vector.data)[channel]);
}

// Real numbers of a pack's channels.
template <typename Stored, typename Real>
struct PackVectors {
  Real addend[kPackSize<Stored>], scale[kPackSize<Stored>], shift[kPackSize<Stored>];

  // Channels [channel, channel + count).
  PARTUNE_MEMBER void read(const ScaleShiftTask& task, int64_t channel, int64_t count) {
    PARTUNE_UNROLL
    for (int i = 0; i < kPackSize<Stored>; ++i) {
      scale[i] = addend[i] = shift[i] = Real(0);
      if (i < count) read_one(task, channel + i, i);
    }
  }

  // One channel, for the whole pack.
  PARTUNE_MEMBER void repeat(const ScaleShiftTask& task, int64_t channel) {
    read_one(task, channel, 0);
    PARTUNE_UNROLL
    for (int i = 1; i < kPackSize<Stored>; ++i) {
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

// Whether all packs of a task are whole and aligned, lines being so long.
template <typename Stored>
PARTUNE_FN bool has_whole_packs(const ScaleShiftTask& task, int64_t length) {
  return length % kPackSize<Stored> == 0 && is_wide_aligned(static_cast<const Stored*>(task.input)) &&
         is_wide_aligned(static_cast<const Stored*>(task.saved)) &&
         is_wide_aligned(static_cast<const Stored*>(task.output));
}

// A pack at a position in memory, forward. A promise that it is whole leaves no branch, and so lets the
// compiler keep the access in one piece.
template <bool kWhole, Activation kActivation, typename Stored, typename Real>
PARTUNE_FN void forward_pack(const ScaleShiftTask& task, const PackVectors<Stored, Real>& vectors,
                             int64_t position, int64_t left) {
  const int64_t count = kWhole ? kPackSize<Stored> : left;
  WidePack<Stored> pack = load_wide(static_cast<const Stored*>(task.input) + position, count, kWhole);
  PARTUNE_UNROLL
  for (int i = 0; i < kPackSize<Stored>; ++i) {
    const Real y = scale_shift_element<kActivation>(widen(pack.at[i]), vectors.addend[i], vectors.scale[i],
                                                    vectors.shift[i]);
    round_nearest(y, pack.at[i]);
  }
  store_wide(pack, static_cast<Stored*>(task.output) + position, count, kWhole);
}

// The same backward, its parts of the sums added to `along` and `plain`.
template <bool kWhole, Activation kActivation, typename Stored, typename Real>
PARTUNE_FN void backward_pack(const ScaleShiftTask& task, const PackVectors<Stored, Real>& vectors,
                              int64_t position, int64_t left, Real (&along)[kPackSize<Stored>],
                              Real (&plain)[kPackSize<Stored>]) {
  const int64_t count = kWhole ? kPackSize<Stored> : left;
  WidePack<Stored> pack = load_wide(static_cast<const Stored*>(task.input) + position, count, kWhole);
  WidePack<Stored> saved = {};
  if (task.saved) saved = load_wide(static_cast<const Stored*>(task.saved) + position, count, kWhole);
  PARTUNE_UNROLL
  for (int i = 0; i < kPackSize<Stored>; ++i) {
    const InnerGrad<Real> inner = inner_grad<kActivation>(
        widen(pack.at[i]), widen(saved.at[i]), vectors.addend[i], vectors.scale[i], vectors.shift[i]);
    along[i] = multiply_add(inner.grad, inner.factor, along[i]);
    plain[i] += inner.grad;
    round_nearest(multiply(inner.grad, vectors.scale[i]), pack.at[i]);
  }
  if (task.output) store_wide(pack, static_cast<Stored*>(task.output) + position, count, kWhole);
}

// Which rows and columns of [rows, channels] a thread has: a pack of each kLanes-th row of a tile.
template <typename Stored, int kBlock>
struct RowTile {
  static constexpr int kLanes = kBlock / 32;
  static constexpr int kColumns = 32 * kPackSize<Stored>;
  int64_t tile, first_row, end_row, column, count;

  PARTUNE_MEMBER explicit RowTile(const ChannelLayout& layout) {
    const int64_t tiles = (layout.channels + kColumns - 1) / kColumns;
    tile = int64_t(blockIdx.x) / tiles;
    first_row = tile * kSumTileRows + threadIdx.x / 32;
    end_row = (tile + 1) * kSumTileRows < layout.outer ? (tile + 1) * kSumTileRows : layout.outer;
    column = int64_t(blockIdx.x) % tiles * kColumns + int64_t(threadIdx.x % 32) * kPackSize<Stored>;
    count = layout.channels - column;
  }
};

// Which neighbours of one channel a warp has.
template <int kBlock>
struct PlaneSegment {
  int64_t sum_row, channel, begin, count;

  PARTUNE_MEMBER explicit PlaneSegment(const ChannelLayout& layout) {
    const int64_t segments = (layout.inner + kPlaneSegment - 1) / kPlaneSegment;
    const int64_t unit = int64_t(blockIdx.x) * (kBlock / 32) + threadIdx.x / 32;
    sum_row = unit / layout.channels;
    channel = unit % layout.channels;
    const int64_t start = sum_row % segments * kPlaneSegment;
    const int64_t outer = sum_row / segments;
    const int64_t left = layout.inner - start;
    count = outer < layout.outer ? (left < kPlaneSegment ? left : kPlaneSegment) : 0;
    begin = (outer * layout.channels + channel) * layout.inner + start;
  }
};

// ---- forward ----

// SASS <float>: LDG.E.128, STG.E.128
// SASS <BFloat16>: LDG.E.128, STG.E.128
template <typename Stored, typename Real, Activation kActivation, int kBlock>
__global__ void __launch_bounds__(kBlock) scale_shift_rows_kernel(const ScaleShiftTask task) {
  const RowTile<Stored, kBlock> tile(task.layout);
  if (tile.count > 0) {
    PackVectors<Stored, Real> vectors;
    vectors.read(task, tile.column, tile.count);
    const int64_t channels = task.layout.channels;
    const int64_t end = tile.end_row * channels, step = tile.kLanes * channels;
    int64_t position = tile.first_row * channels + tile.column;
    if (has_whole_packs<Stored>(task, channels)) {
#pragma unroll 1
      for (; position < end; position += step) forward_pack<true, kActivation>(task, vectors, position, 0);
    } else {
#pragma unroll 1
      for (; position < end; position += step) {
        forward_pack<false, kActivation>(task, vectors, position, tile.count);
      }
    }
  }
}

// SASS <float>: LDG.E.128, STG.E.128
// SASS <BFloat16>: LDG.E.128, STG.E.128
template <typename Stored, typename Real, Activation kActivation, int kBlock>
__global__ void __launch_bounds__(kBlock) scale_shift_planes_kernel(const ScaleShiftTask task) {
  const PlaneSegment<kBlock> segment(task.layout);
  if (segment.count > 0) {
    PackVectors<Stored, Real> vectors;
    vectors.repeat(task, segment.channel);
    int64_t i = threadIdx.x % 32 * kPackSize<Stored>;
    if (has_whole_packs<Stored>(task, task.layout.inner)) {
#pragma unroll 1
      for (; i < segment.count; i += 32 * kPackSize<Stored>) {
        forward_pack<true, kActivation>(task, vectors, segment.begin + i, 0);
      }
    } else {
#pragma unroll 1
      for (; i < segment.count; i += 32 * kPackSize<Stored>) {
        forward_pack<false, kActivation>(task, vectors, segment.begin + i, segment.count - i);
      }
    }
  }
}

// ---- backward ----

// SASS <float>: LDG.E.128 x2, STG.E.128
// SASS <BFloat16>: LDG.E.128 x2, STG.E.128
template <typename Stored, typename Real, Activation kActivation, int kBlock>
__global__ void __launch_bounds__(kBlock) scale_shift_backward_rows_kernel(const ScaleShiftTask task) {
  constexpr int kPack = kPackSize<Stored>, kLanes = kBlock / 32;
  SHARED(Real, sums, [kLanes][2][32 * kPack]);
  const RowTile<Stored, kBlock> tile(task.layout);
  Real along[kPack] = {}, plain[kPack] = {};
  if (tile.count > 0) {
    PackVectors<Stored, Real> vectors;
    vectors.read(task, tile.column, tile.count);
    const int64_t channels = task.layout.channels;
    const int64_t end = tile.end_row * channels, step = kLanes * channels;
    int64_t position = tile.first_row * channels + tile.column;
    if (has_whole_packs<Stored>(task, channels)) {
#pragma unroll 1
      for (; position < end; position += step) {
        backward_pack<true, kActivation>(task, vectors, position, 0, along, plain);
      }
    } else {
#pragma unroll 1
      for (; position < end; position += step) {
        backward_pack<false, kActivation>(task, vectors, position, tile.count, along, plain);
      }
    }
  }
  PARTUNE_UNROLL
  for (int i = 0; i < kPack; ++i) {
    sums[threadIdx.x / 32][0][threadIdx.x % 32 * kPack + i] = along[i];
    sums[threadIdx.x / 32][1][threadIdx.x % 32 * kPack + i] = plain[i];
  }
  __syncthreads();
  if (task.partial) {
    const int64_t first = tile.column - int64_t(threadIdx.x % 32) * kPack;
    for (int i = int(threadIdx.x); i < 2 * 32 * kPack; i += kBlock) {
      const int which = i / (32 * kPack), column = i % (32 * kPack);
      Real sum = sums[0][which][column];
      PARTUNE_UNROLL
      for (int lane = 1; lane < kLanes; ++lane) sum += sums[lane][which][column];
      if (first + column < task.layout.channels) {
        static_cast<Real*>(task.partial)[(tile.tile * 2 + which) * task.layout.channels + first + column] =
            sum;
      }
    }
  }
}

// SASS <float>: LDG.E.128 x2, STG.E.128
// SASS <BFloat16>: LDG.E.128 x2, STG.E.128
template <typename Stored, typename Real, Activation kActivation, int kBlock>
__global__ void __launch_bounds__(kBlock) scale_shift_backward_planes_kernel(const ScaleShiftTask task) {
  constexpr int kPack = kPackSize<Stored>;
  const PlaneSegment<kBlock> segment(task.layout);
  Real along[kPack] = {}, plain[kPack] = {};
  if (segment.count > 0) {
    PackVectors<Stored, Real> vectors;
    vectors.repeat(task, segment.channel);
    int64_t i = threadIdx.x % 32 * kPack;
    if (has_whole_packs<Stored>(task, task.layout.inner)) {
#pragma unroll 1
      for (; i < segment.count; i += 32 * kPack) {
        backward_pack<true, kActivation>(task, vectors, segment.begin + i, 0, along, plain);
      }
    } else {
#pragma unroll 1
      for (; i < segment.count; i += 32 * kPack) {
        backward_pack<false, kActivation>(task, vectors, segment.begin + i, segment.count - i, along, plain);
      }
    }
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
  if (task.partial && segment.count > 0 && threadIdx.x % 32 == 0) {
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
