// The functions of core.h and options.h, on the grid that runs.
#include "core.h"

#include <cstdio>
#include <cstring>
#include <mutex>
#include <stdexcept>

#include "launch_limits.h"
#include "options.h"
#include "sanitizer.h"
#include "scheduler.h"

#ifdef EMULATOR_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {
namespace {

int races = 0;

std::string to_string(CallSite site) {
  return site.file ? " at " + std::string(site.file) + ":" + std::to_string(site.line) : "";
}

// A sanitizer that ends the program knows nothing of CUDA threads.
[[maybe_unused]] void print_place() {
  if (grid) std::fprintf(stderr, "emulator: while running %s\n", grid->place().c_str());
}

#ifdef EMULATOR_ASAN
const bool tells_place = (__sanitizer_set_death_callback(print_place), true);
#endif

}  // namespace

Options options;

void run_grid(const Launch& launch) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const std::string error = launch_error(launch);
  if (!error.empty()) {
    throw std::runtime_error("impossible launch of kernel " + std::string(launch.kernel) +
                             to_string(launch.site) + ": " + error);
  }
  Grid running(launch);
  grid = &running;
  struct Reset {
    ~Reset() { grid = nullptr; }
  } const reset;
  running.run();
}

void fail(const std::string& what, CallSite site) {
  if (!grid) throw std::runtime_error(what + to_string(site) + " outside of any kernel");
  grid->abandon(grid->place() + ": " + what + to_string(site));
}

void warp_collective(const char* name, Exchange exchange, unsigned mask, void* slot, CallSite site) {
  grid->collective(name, exchange, mask, slot, site);
}

void sync_warp(unsigned mask, CallSite site) { grid->sync_warp(mask, site); }

int sync_block(const char* name, Vote vote, bool predicate, CallSite site) {
  return grid->sync_block(name, vote, predicate, site);
}

void* static_shared(const void* key, size_t bytes, size_t alignment) {
  return grid->static_shared(key, bytes, alignment);
}

void* dynamic_shared() { return grid->dynamic_shared(); }

// A copy writes to shared memory now or at any time until it is waited for: the race checker is told
// of both ends, and until then there is garbage.
void copy_async(void* shared, const void* global, unsigned bytes, bool valid, CallSite site) {
  const auto misaligned = [&](const void* p) { return reinterpret_cast<uintptr_t>(p) % bytes != 0; };
  if (misaligned(shared) || (valid && misaligned(global))) fail("a misaligned cp.async", site);
  if (valid && sanitizer::is_outside_allocations(global, bytes)) {
    fail("a cp.async that reads outside of any allocation", site);
  }
  if (sanitizer::is_outside_allocations(shared, bytes)) {
    fail("a cp.async that writes outside of any allocation", site);
  }
  if (valid) sanitizer::note_read(global, bytes);
  sanitizer::note_write(shared, bytes);
  std::memset(shared, options.fill, bytes);
  Thread& self = grid->running();
  self.copies.push_back({static_cast<char*>(shared), valid ? static_cast<const char*>(global) : nullptr,
                         bytes, self.copy_group});
}

void commit_copies() { ++grid->running().copy_group; }

void wait_for_copies(int keep) {
  Thread& self = grid->running();
  size_t kept = 0;
  for (const PendingCopy& copy : self.copies) {
    if (copy.group >= self.copy_group - keep) {
      self.copies[kept++] = copy;
      continue;
    }
    sanitizer::note_write(copy.to, copy.bytes);
    if (copy.from) {
      std::memcpy(copy.to, copy.from, copy.bytes);
    } else {
      std::memset(copy.to, 0, copy.bytes);
    }
  }
  self.copies.resize(kept);
}

void fence() {
  Thread& self = grid->running();
  self.fenced = true;
  if (self.last_atomic) sanitizer::acquire(self.last_atomic);
}

void note_atomic(void* address) {
  if (!sanitizer::kChecksRaces) return;
  Thread& self = grid->running();
  self.last_atomic = address;
  if (self.fenced) sanitizer::release(address);
}

int arch() { return options.arch; }

}  // namespace emulator

extern "C" {

void emulator_set_order(int order, uint64_t seed, int fill) {
  emulator::options.order = emulator::Order(order);
  emulator::options.seed = seed;
  emulator::options.fill = uint8_t(fill);
}

void emulator_set_arch(int arch) { emulator::options.arch = arch; }

int emulator_races() { return emulator::races; }

#ifdef EMULATOR_ASAN
void __ubsan_on_report() { emulator::print_place(); }  // called by the sanitizer's runtime
#endif
#ifdef EMULATOR_TSAN
void __tsan_on_report(void*) {  // likewise
  ++emulator::races;
  emulator::print_place();
}
#endif
}
