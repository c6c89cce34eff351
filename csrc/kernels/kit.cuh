// The one header that CUDA kernels include: what they may use of CUDA, under names that a second
// implementation can give a meaning on the CPU. Shared memory, launches and inline PTX go through here.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "platform.h"

// SHARED(float, partial, [32]) declares a block's array.
#define SHARED(T, name, dims) __shared__ T name dims
#define GRID_CONSTANT __grid_constant__

template <typename... Parameters, typename... Arguments>
cudaError_t kit_launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                       cudaStream_t stream, const Arguments&... arguments) {
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}
#define LAUNCH(kernel, ...) kit_launch(kernel, __VA_ARGS__)

namespace partune {

// Four neighbours, read and written in one access where memory is aligned to all of them.
template <typename T>
struct alignas(4 * sizeof(T)) Pack4 {
  T at[4];
};

template <typename T>
PARTUNE_FN Pack4<T> load_pack(const T* from, int count, bool aligned) {
  Pack4<T> pack = {};
  if (aligned && count == 4) return *reinterpret_cast<const Pack4<T>*>(from);
  PARTUNE_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (i < count) pack.at[i] = from[i];
  }
  return pack;
}

template <typename T>
PARTUNE_FN void store_pack(const Pack4<T>& pack, T* to, int count, bool aligned) {
  if (aligned && count == 4) {
    *reinterpret_cast<Pack4<T>*>(to) = pack;
    return;
  }
  PARTUNE_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (i < count) to[i] = pack.at[i];
  }
}

template <typename T>
PARTUNE_FN bool is_aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % sizeof(Pack4<T>) == 0;
}

}  // namespace partune
