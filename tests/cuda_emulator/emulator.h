// CUDA C++ kernels compiled as plain C++17 and run on the CPU: what csrc/kernels/kit.cuh includes
// where the compiler isn't nvcc. A kernel's blocks run one after the other, a block's threads as
// fibers that take turns in an order that the tests choose.
#pragma once
#ifdef __CUDACC__
#error "for the host compiler only"
#endif
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <tuple>
#include <type_traits>

#include "builtins.h"
#include "core.h"
#include "instructions.h"

// To g++ the toolkit's __shared__ is nothing, and an array of a block would silently become one of a
// thread. This doesn't compile: use SHARED.
#undef __shared__
#define __shared__ use_SHARED_instead_of_a_raw_shared_array

// Each array is allocated anew for each block, with its exact size. Its key is its identity: one per
// declaration and template instance, as in CUDA.
// NOLINTBEGIN(bugprone-macro-parentheses): a type
#define SHARED(T, name, dims)                                               \
  typedef T emulated_type_##name dims;                                      \
  static char emulated_key_##name;                                          \
  auto& name = *static_cast<emulated_type_##name*>(emulator::static_shared( \
      &emulated_key_##name, sizeof(emulated_type_##name), alignof(emulated_type_##name)))
#define DYN_SHARED(T, name) T* name = static_cast<T*>(emulator::dynamic_shared())
// NOLINTEND(bugprone-macro-parentheses)
#define LAUNCH_PARAMETER(...) const __VA_ARGS__&  // not copied for each thread

#define LAUNCH(kernel, ...) \
  emulator::launch(#kernel, emulator::CallSite{__FILE__, __LINE__}, kernel, __VA_ARGS__)

namespace emulator {

// How many bytes of launch parameters these take, each aligned as itself.
template <typename... Parameters>
constexpr size_t parameter_bytes() {
  size_t end = 0;
  ((end = (end + alignof(Parameters) - 1) / alignof(Parameters) * alignof(Parameters) + sizeof(Parameters)),
   ...);
  return end;
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(const char* name, CallSite site, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                   size_t shared_bytes, cudaStream_t, const Arguments&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::decay_t<Parameters>...> arguments;
  };
  const Call call{kernel, std::tuple<std::decay_t<Parameters>...>(arguments...)};
  const auto run_thread = [](const void* context) {
    const Call& made = *static_cast<const Call*>(context);
    std::apply(made.kernel, made.arguments);
  };
  run_grid({name, site, grid, block, shared_bytes, parameter_bytes<std::decay_t<Parameters>...>(), run_thread,
            &call});
  return cudaSuccess;
}

}  // namespace emulator

namespace partune {

using emulator::cp_async;
using emulator::cp_async_commit;
using emulator::cp_async_wait;
using emulator::has_bf16_mma;
using emulator::ldmatrix_x4;
using emulator::mma_bf16_16x8x16;

}  // namespace partune
