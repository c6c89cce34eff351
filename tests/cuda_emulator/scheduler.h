// One launch under way: its blocks one after the other, a block's threads in turns.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "core.h"
#include "fiber.h"

namespace emulator {

enum class State : uint8_t { kReady, kAtCollective, kAtBarrier, kExited };

// A cp.async under way.
struct PendingCopy {
  char* to;
  const char* from;  // null: zeros
  unsigned bytes;
  int group;
};

struct Thread {
  uint3 index;
  Fiber* fiber;  // null: not started
  State state;
  // where it waits, and for a collective with whom
  const char* call;
  CallSite site;
  unsigned mask;
  Exchange exchange;
  void* slot;
  std::vector<PendingCopy> copies;
  int copy_group;
  // of the memory model: has it passed a fence, and which atomic came last
  bool fenced;
  void* last_atomic;
};

struct Warp {
  unsigned alive, waiting;  // a bit per lane
  int phase;                // alternates with each __syncwarp of all lanes
};

// How the threads of the block stand at __syncthreads.
struct Barrier {
  int arrived, votes, first;  // first: the thread that came first
  Vote vote;
  int result;
  int phase;  // alternates with each barrier
};

struct SharedArray {
  const void* key;
  void* memory;
};

class Grid {
 public:
  explicit Grid(const Launch& launch);
  ~Grid();
  Grid(const Grid&) = delete;
  Grid& operator=(const Grid&) = delete;

  void run();

  // The rest is called by the running thread.
  void collective(const char* name, Exchange exchange, unsigned mask, void* slot, CallSite site);
  void sync_warp(unsigned mask, CallSite site);
  int sync_block(const char* name, Vote vote, bool predicate, CallSite site);
  void* static_shared(const void* key, size_t bytes, size_t alignment);
  void* dynamic_shared() const { return dynamic_shared_; }
  Thread& running() { return threads_[size_t(current_)]; }
  // Leaves the kernel with this error.
  [[noreturn]] void abandon(const std::string& error);
  // Kernel, block and thread that run now.
  std::string place() const;

 private:
  void run_block(uint64_t number, uint64_t turn);
  void free_shared();
  int pick();
  void enter(int thread);
  void make_ready(int thread) { ready_[size_t(thread) / 64] |= uint64_t(1) << (thread % 64); }
  void suspend();
  void exit_running();
  void pass_on();
  void release_barrier();
  bool group_is_complete(int warp, int lane);
  void release_group(int warp, int lane);
  std::string describe(const Thread& thread) const;
  std::string deadlock() const;
  uint64_t random();
  Fiber* take_fiber();
  static void live();

  const Launch launch_;
  std::vector<Thread> threads_;
  std::vector<uint64_t> ready_;  // a bit per thread
  std::vector<Warp> warps_;
  Barrier barrier_ = {};
  int current_ = -1, left_ = 0;
  std::vector<SharedArray> static_shared_;
  size_t static_bytes_ = 0;
  void* dynamic_shared_ = nullptr;
  // Words through which barriers order memory: two of the block, three of each warp. Successive
  // barriers use different ones, which threads may still be leaving; no block uses another's.
  char* sync_ = nullptr;
  std::vector<void*> outlived_;  // memory of blocks that have run
  Fiber host_;
  std::string error_;
  uint64_t random_state_;
  char started_ = 0, ended_ = 0;  // words that order the host's work and the grid's
};

// The grid that runs, or null.
extern Grid* grid;

}  // namespace emulator
