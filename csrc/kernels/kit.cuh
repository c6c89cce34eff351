// The one header that CUDA kernels include: what they may use of CUDA, under names that a second
// implementation can give a meaning on the CPU. Shared memory, launches and inline PTX go through
// here. Under any other compiler than nvcc all of it comes from tests/cuda_emulator.
#pragma once
#include "platform.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// SHARED(float, partial, [32]) declares a block's array.
#define SHARED(T, name, dims) __shared__ T name dims
// NOLINTBEGIN(bugprone-macro-parentheses): T is a type, and name what it declares
// DYN_SHARED(float, tile) points to the shared memory that the launch asked for, aligned to 128 bytes.
#define DYN_SHARED(T, name)                                            \
  extern __shared__ __align__(128) unsigned char kit_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(kit_dynamic_shared)
// NOLINTEND(bugprone-macro-parentheses)
// LAUNCH_PARAMETER(Launch) launch: a large parameter that all threads read where the launch left it.
#define LAUNCH_PARAMETER(...) const __grid_constant__ __VA_ARGS__

template <typename... Parameters, typename... Arguments>
cudaError_t kit_launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                       cudaStream_t stream, const Arguments&... arguments) {
  // Above 48 KB a kernel has to be told of its dynamic shared memory before it is launched.
  if (shared_bytes > size_t(48) * 1024) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}
#define LAUNCH(kernel, ...) kit_launch(kernel, __VA_ARGS__)

namespace partune {

// Copies Bytes (4, 8 or 16, both sides aligned to them) from global to shared memory without passing
// through registers; zeros where `valid` is false, and then `global` isn't read. The copies that a
// thread has started since its last cp_async_commit() form a group.
template <int Bytes>
__device__ __forceinline__ void cp_async(void* shared, const void* global, bool valid) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "what the hardware copies at once");
#if __CUDA_ARCH__ >= 800
  const unsigned to = unsigned(__cvta_generic_to_shared(shared));
  const int read = valid ? Bytes : 0;
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(read)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(Bytes), "r"(read)
                 : "memory");
  }
#else
  struct alignas(Bytes) Words {
    uint32_t at[Bytes / 4];
  };
  Words words = {};
  if (valid) words = *static_cast<const Words*>(global);
  *static_cast<Words*>(shared) = words;
#endif
}

__device__ __forceinline__ void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most the newest Keep groups of this thread are under way. Others see the bytes after
// the next barrier.
template <int Keep>
__device__ __forceinline__ void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(Keep) : "memory");
#endif
}

// Whether the GPU that this is compiled for has mma_bf16_16x8x16.
__device__ __forceinline__ constexpr bool has_bf16_mma() {
#if __CUDA_ARCH__ >= 800
  return true;
#else
  return false;
#endif
}

// d = a·b + c by a whole warp, from sm_80: a [16, 16] row-major, b [16, 8] column-major, c and d
// [16, 8]. With group = lane / 4 and pair = 2·(lane % 4), a lane holds
//   a: (group, pair..), (group + 8, pair..), (group, pair + 8..), (group + 8, pair + 8..)
//   b: (pair.., group), (pair + 8.., group)
//   c, d: (group, pair), (group, pair + 1), (group + 8, pair), (group + 8, pair + 1)
__device__ __forceinline__ void mma_bf16_16x8x16(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2], const float (&c)[4]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),
        "f"(c[3]));
#else
  __trap();  // the launcher must not come here
#endif
}

// Four 8×8 matrices of 16-bit elements from shared memory: lane 8·i + j names row j of matrix i, 16
// aligned bytes; r[i] then holds elements 2·(lane % 4) and the next of row lane / 4 of matrix i.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  const unsigned from = unsigned(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}

}  // namespace partune
#else
#include "emulator.h"
#endif

namespace partune {

// Four neighbours, read and written in one access where memory is aligned to all of them; the first
// `count` of them where fewer are there.
template <typename T>
struct alignas(4 * sizeof(T)) Pack4 {
  T at[4];
};

template <typename T>
PARTUNE_FN Pack4<T> load_pack(const T* from, int64_t count, bool aligned) {
  Pack4<T> pack = {};
  if (aligned && count >= 4) return *reinterpret_cast<const Pack4<T>*>(from);
  PARTUNE_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (i < count) pack.at[i] = from[i];
  }
  return pack;
}

template <typename T>
PARTUNE_FN void store_pack(const Pack4<T>& pack, T* to, int64_t count, bool aligned) {
  if (aligned && count >= 4) {
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
