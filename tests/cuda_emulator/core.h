// What the emulated builtins and the launch macro ask of the scheduler.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <string>

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace emulator {

constexpr unsigned kFullMask = 0xffffffffu;

// The line of a kernel that called a builtin: every builtin takes one as its last, default argument.
struct CallSite {
  const char* file = nullptr;
  int line = 0;
};
#define EMULATOR_CALL_SITE emulator::CallSite site = {__builtin_FILE(), __builtin_LINE()}

struct Launch {
  const char* kernel;
  CallSite site;
  dim3 grid, block;
  size_t shared_bytes, parameter_bytes;
  void (*run_thread)(const void* context);
  const void* context;
};

// Runs every thread of a grid; std::runtime_error with kernel, block, thread and line where the launch
// or the kernel is wrong.
void run_grid(const Launch& launch);

// Gives up the launch for an error of the running thread. Other threads are abandoned where they are:
// kernels own nothing that needs a destructor.
[[noreturn]] void fail(const std::string& what, CallSite site = {});

// Every warp builtin is one of these: lanes bring a record each, and the last to arrive computes for
// all. Slot i is lane i's record; `lanes` has a bit for each that takes part.
using Exchange = void (*)(void* const* slots, unsigned lanes);
void warp_collective(const char* name, Exchange exchange, unsigned mask, void* slot, CallSite site);
void sync_warp(unsigned mask, CallSite site);

enum class Vote { kNone, kCount, kAnd, kOr };
int sync_block(const char* name, Vote vote, bool predicate, CallSite site);

// Memory of the running block, filled with a byte that the tests choose.
void* static_shared(const void* key, size_t bytes, size_t alignment);
void* dynamic_shared();

// cp.async: the destination holds garbage until the running thread has waited for the copy's group.
void copy_async(void* shared, const void* global, unsigned bytes, bool valid, CallSite site);
void commit_copies();
void wait_for_copies(int keep);

// How fences order memory: what a thread did before a fence and an atomic is seen by whoever has read
// that atomic and then passed a fence. Only the race checker asks.
void fence();
void note_atomic(void* address);

// The compute capability whose limits hold, 75 for sm_75.
int arch();

}  // namespace emulator
