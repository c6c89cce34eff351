#include "scheduler.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>
#include <stdexcept>
#include <utility>

#include "launch_limits.h"
#include "options.h"
#include "sanitizer.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;  // NOLINT(bugprone-throwing-static-initialization): (1, 1, 1)

namespace emulator {

Grid* grid = nullptr;

namespace {

// Leaves a thread's frames; thrown and caught on the same fiber.
struct Abandoned : std::exception {};

// All fibers, and those that wait for another thread to run.
std::vector<Fiber*> fibers, idle;

// For the race checker a fiber is an identity: two threads that share one never race. Each thread has
// its own, and a block doesn't get those of the two blocks before it.
std::vector<Fiber*> identities[3];

std::string to_string(uint3 index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z) + ")";
}

std::string to_string(CallSite site) {
  return site.file ? " " + std::string(site.file) + ":" + std::to_string(site.line) : "";
}

// To the race checker an allocation is a write; this one is nobody's.
void* fresh_memory(size_t bytes, size_t alignment) {
  const sanitizer::Unseen unseen;
  void* memory = nullptr;
  if (posix_memalign(&memory, alignment, bytes) != 0) throw std::bad_alloc();
  std::memset(memory, options.fill, bytes);
  return memory;
}

uint64_t count(dim3 size) { return uint64_t(size.x) * size.y * size.z; }

uint3 index_in(dim3 size, uint64_t number) {
  return {unsigned(number % size.x), unsigned(number / size.x % size.y), unsigned(number / size.x / size.y)};
}

}  // namespace

Grid::Grid(const Launch& launch) : launch_(launch), random_state_(options.seed * 0x9E3779B97F4A7C15u | 1u) {
  const size_t threads = size_t(count(launch.block));
  threads_.resize(threads);
  for (size_t i = 0; i < threads; ++i) threads_[i].index = index_in(launch.block, i);
  ready_.resize((threads + 63) / 64);
  warps_.resize((threads + 31) / 32);
}

Grid::~Grid() {
  free_shared();
  // Threads that were abandoned have nothing that orders what they allocated before this.
  const sanitizer::Unseen unseen;
  for (void* memory : outlived_) std::free(memory);
  threads_.clear();
}

void Grid::run() {
  host_.adopt_thread();
  blockDim = launch_.block;
  gridDim = launch_.grid;
  sanitizer::release(&started_);
  const uint64_t blocks = count(launch_.grid);
  std::vector<uint64_t> shuffled;
  if (options.order == Order::kShuffled) {
    shuffled.resize(blocks);
    for (uint64_t i = 0; i < blocks; ++i) shuffled[i] = i;
    for (uint64_t i = blocks; i > 1; --i) std::swap(shuffled[i - 1], shuffled[random() % i]);
  }
  for (uint64_t i = 0; i < blocks && error_.empty(); ++i) {
    const uint64_t number = options.order == Order::kForward   ? i
                            : options.order == Order::kReverse ? blocks - 1 - i
                                                               : shuffled[i];
    run_block(number, i);
  }
  sanitizer::acquire(&ended_);
  if (error_.empty()) return;
  // Its threads stand where they stood. An identity can't start anew, a stack can.
  if (sanitizer::kChecksRaces) {
    for (auto& set : identities) set.clear();
  } else {
    for (Fiber* fiber : fibers) fiber->restart(&Grid::live);
    idle = fibers;
  }
  throw std::runtime_error(error_);
}

void Grid::run_block(uint64_t number, uint64_t turn) {
  blockIdx = index_in(launch_.grid, number);
  left_ = int(threads_.size());
  for (int i = 0; i < left_; ++i) {
    Thread& thread = threads_[size_t(i)];
    thread.fiber = nullptr;
    thread.state = State::kReady;
    thread.copy_group = 0;
    thread.fenced = false;
    thread.last_atomic = nullptr;
    make_ready(i);
  }
  for (size_t i = 0; i < warps_.size(); ++i) {
    const size_t lanes = std::min<size_t>(32, threads_.size() - 32 * i);
    warps_[i].alive = kFullMask >> (32 - lanes);
    warps_[i].waiting = 0;
  }
  barrier_.arrived = barrier_.votes = 0;
  sync_ = static_cast<char*>(fresh_memory(2 + 3 * warps_.size(), 16));
  if (launch_.shared_bytes > 0) dynamic_shared_ = fresh_memory(launch_.shared_bytes, 128);
  if (sanitizer::kChecksRaces) {
    // Made here, not where a thread starts: whoever makes an identity is ordered before it.
    auto& set = identities[turn % 3];
    while (set.size() < threads_.size()) set.push_back(Fiber::make(&Grid::live));
    for (size_t i = 0; i < threads_.size(); ++i) threads_[i].fiber = set[i];
  }
  enter(pick());
  if (!running().fiber) running().fiber = take_fiber();
  host_.switch_to(*running().fiber);
  current_ = -1;
  free_shared();
}

// The race checker must not see one block's array where another's was: under it all live on until the
// launch ends.
void Grid::free_shared() {
  if (dynamic_shared_) outlived_.push_back(dynamic_shared_);
  for (const SharedArray& array : static_shared_) outlived_.push_back(array.memory);
  if (sync_) outlived_.push_back(sync_);
  dynamic_shared_ = nullptr;
  sync_ = nullptr;
  static_shared_.clear();
  static_bytes_ = 0;
  if (sanitizer::kChecksRaces) return;
  for (void* memory : outlived_) std::free(memory);
  outlived_.clear();
}

Fiber* Grid::take_fiber() {
  if (idle.empty()) {
    fibers.push_back(Fiber::make(&Grid::live));
    return fibers.back();
  }
  Fiber* const fiber = idle.back();
  idle.pop_back();
  return fiber;
}

// What a fiber does: one thread after another, of this launch and those to come.
void Grid::live() {
  for (;;) {
    sanitizer::acquire(&grid->started_);
    bool abandoned = false;
    try {
      grid->launch_.run_thread(grid->launch_.context);
      grid->exit_running();
    } catch (const Abandoned&) {
      // Leave the handler before switching: what is being handled belongs to the operating system's
      // thread, not to the fiber.
      abandoned = true;
    }
    sanitizer::release(&grid->ended_);
    if (abandoned) grid->running().fiber->switch_to(grid->host_);
    grid->pass_on();
  }
}

// The running thread has exited. Its fiber goes on with one that hasn't started, or makes way.
void Grid::pass_on() {
  Fiber& fiber = *running().fiber;
  const int next = pick();
  if (next < 0) {
    if (left_ > 0) {
      error_ = deadlock();
      sanitizer::release(&ended_);
    }
    if (!sanitizer::kChecksRaces) idle.push_back(&fiber);
    fiber.switch_to(host_);
    return;
  }
  enter(next);
  if (!running().fiber) {
    running().fiber = &fiber;
    return;
  }
  if (!sanitizer::kChecksRaces) idle.push_back(&fiber);
  fiber.switch_to(*running().fiber);
}

void Grid::enter(int thread) {
  ready_[size_t(thread) / 64] &= ~(uint64_t(1) << (thread % 64));
  current_ = thread;
  threadIdx = threads_[size_t(thread)].index;
}

// The running thread waits. Returns when it goes on.
void Grid::suspend() {
  Thread& self = running();
  const int next = pick();
  if (next < 0) abandon(deadlock());
  enter(next);
  Thread& other = running();
  if (&other == &self) return;
  if (!other.fiber) other.fiber = take_fiber();
  self.fiber->switch_to(*other.fiber);
}

void Grid::exit_running() {
  Thread& self = running();
  if (!self.copies.empty()) abandon(place() + ": exits with cp.async copies that it never waited for");
  self.state = State::kExited;
  --left_;
  const int number = current_ / 32;
  Warp& warp = warps_[size_t(number)];
  warp.alive &= ~(1u << (current_ % 32));
  for (unsigned lanes = warp.waiting; lanes != 0; lanes &= lanes - 1) {
    group_is_complete(number, __builtin_ctz(lanes));  // an error if it waits for this thread
  }
}

uint64_t Grid::random() {
  random_state_ ^= random_state_ << 13;
  random_state_ ^= random_state_ >> 7;
  random_state_ ^= random_state_ << 17;
  return random_state_;
}

// The thread that runs next: the lowest, the highest or any of those that are ready; -1 if none is.
int Grid::pick() {
  const int words = int(ready_.size());
  if (options.order == Order::kForward) {
    for (int i = 0; i < words; ++i) {
      if (ready_[size_t(i)] != 0) return 64 * i + __builtin_ctzll(ready_[size_t(i)]);
    }
  } else if (options.order == Order::kReverse) {
    for (int i = words - 1; i >= 0; --i) {
      if (ready_[size_t(i)] != 0) return 64 * i + 63 - __builtin_clzll(ready_[size_t(i)]);
    }
  } else {
    const uint64_t drawn = random();
    const int first = int(drawn % uint64_t(words)), bit = int(drawn >> 32 & 63);
    for (int i = 0; i <= words; ++i) {
      const int word = (first + i) % words;
      const uint64_t candidates = ready_[size_t(word)] & (i == 0 ? ~uint64_t(0) << bit : ~uint64_t(0));
      if (candidates != 0) return 64 * word + __builtin_ctzll(candidates);
    }
  }
  return -1;
}

std::string Grid::place() const {
  std::string text = "kernel " + std::string(launch_.kernel) + " block " + to_string(blockIdx);
  if (current_ >= 0) text += " thread " + to_string(threads_[size_t(current_)].index);
  return text;
}

std::string Grid::describe(const Thread& thread) const {
  const std::string name = "thread " + to_string(thread.index);
  if (thread.state == State::kExited) return name + " has exited";
  std::string text = name + " waits at " + thread.call + to_string(thread.site);
  if (thread.state == State::kAtCollective && thread.mask != kFullMask) {
    char mask[32];
    std::snprintf(mask, sizeof mask, " (mask 0x%08x)", thread.mask);
    text += mask;
  }
  return text;
}

// One line for each state that threads are in, with how many they are.
std::string Grid::deadlock() const {
  struct Group {
    const Thread* first;
    int others;
  };
  std::vector<Group> groups;
  const auto alike = [](const Thread& a, const Thread& b) {
    if (a.state != b.state) return false;
    if (a.state == State::kExited) return true;
    return std::strcmp(a.call, b.call) == 0 && a.site.line == b.site.line && a.mask == b.mask;
  };
  for (const Thread& thread : threads_) {
    const auto group = std::find_if(groups.begin(), groups.end(),
                                    [&](const Group& known) { return alike(*known.first, thread); });
    if (group == groups.end()) {
      groups.push_back({&thread, 0});
    } else {
      ++group->others;
    }
  }
  std::string text = "deadlock in kernel " + std::string(launch_.kernel) + " block " + to_string(blockIdx) +
                     ": no thread can go on;";
  for (const Group& group : groups) {
    text += "\n  " + describe(*group.first);
    if (group.others > 0) text += " (and " + std::to_string(group.others) + " more)";
  }
  return text;
}

void Grid::abandon(const std::string& error) {
  error_ = error;
  throw Abandoned{};
}

// ---- warps ----

// Whether all lanes that this one waits for wait for the same. One that waits for something else may
// still come round; else there is a deadlock, which is reported then.
bool Grid::group_is_complete(int number, int lane) {
  const Warp& warp = warps_[size_t(number)];
  const Thread* const lanes = &threads_[size_t(number) * 32];
  const Thread& self = lanes[lane];
  const unsigned missing = self.mask & ~warp.alive;
  if (missing != 0) {
    abandon("kernel " + std::string(launch_.kernel) + " block " + to_string(blockIdx) + ": " +
            describe(self) + " for lane " + std::to_string(__builtin_ctz(missing)) +
            ", which has exited or doesn't exist");
  }
  if ((warp.waiting & self.mask) != self.mask) return false;
  for (unsigned rest = self.mask; rest != 0; rest &= rest - 1) {
    const Thread& other = lanes[__builtin_ctz(rest)];
    if (other.mask != self.mask || other.exchange != self.exchange) return false;
  }
  return true;
}

void Grid::release_group(int number, int lane) {
  Warp& warp = warps_[size_t(number)];
  Thread* const lanes = &threads_[size_t(number) * 32];
  const unsigned mask = lanes[lane].mask;
  void* slots[32];
  for (int i = 0; i < 32; ++i) slots[i] = mask >> i & 1u ? lanes[i].slot : nullptr;
  if (lanes[lane].exchange) {
    // Lanes' records are on their stacks; reading them is the emulator's doing.
    const sanitizer::Unseen unseen;
    lanes[lane].exchange(slots, mask);
  }
  if (mask == kFullMask && !lanes[lane].exchange) warp.phase ^= 1;
  warp.waiting &= ~mask;
  for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
    const int other = __builtin_ctz(rest);
    lanes[other].state = State::kReady;
    if (other != lane) make_ready(number * 32 + other);
  }
}

void Grid::collective(const char* name, Exchange exchange, unsigned mask, void* slot, CallSite site) {
  Thread& self = running();
  const int number = current_ / 32, lane = current_ % 32;
  self.call = name;
  self.site = site;
  self.mask = mask;
  self.exchange = exchange;
  self.slot = slot;
  if (!(mask >> lane & 1u)) fail(std::string(name) + " with a mask that leaves the calling lane out,", site);
  self.state = State::kAtCollective;
  warps_[size_t(number)].waiting |= 1u << lane;
  if (group_is_complete(number, lane)) {
    release_group(number, lane);
  } else {
    suspend();
  }
}

// Of all warp builtins the only one that orders memory.
void Grid::sync_warp(unsigned mask, CallSite site) {
  const size_t number = size_t(current_) / 32;
  char* const sync = sync_ + 2 + 3 * number + (mask == kFullMask ? warps_[number].phase : 2);
  sanitizer::release(sync);
  collective("__syncwarp", nullptr, mask, nullptr, site);
  sanitizer::acquire(sync);
}

// ---- the block ----

int Grid::sync_block(const char* name, Vote vote, bool predicate, CallSite site) {
  Thread& self = running();
  self.state = State::kAtBarrier;
  self.call = name;
  self.site = site;
  self.mask = kFullMask;
  if (barrier_.arrived == 0) {
    barrier_.first = current_;
    barrier_.vote = vote;
  } else {
    const Thread& first = threads_[size_t(barrier_.first)];
    if (first.site.line != site.line || std::strcmp(first.site.file, site.file) != 0 ||
        barrier_.vote != vote) {
      abandon("divergent barrier in kernel " + std::string(launch_.kernel) + " block " + to_string(blockIdx) +
              ":\n  " + describe(first) + "\n  " + describe(self));
    }
  }
  barrier_.votes += predicate ? 1 : 0;
  char* const sync = sync_ + barrier_.phase;
  sanitizer::release(sync);
  // An exited thread never arrives: then it is a deadlock.
  if (++barrier_.arrived == int(threads_.size())) {
    release_barrier();
  } else {
    suspend();
  }
  sanitizer::acquire(sync);
  return barrier_.result;
}

void Grid::release_barrier() {
  const int votes = barrier_.votes;
  barrier_.result = barrier_.vote == Vote::kAnd  ? votes == int(threads_.size())
                    : barrier_.vote == Vote::kOr ? votes != 0
                                                 : votes;
  barrier_.arrived = barrier_.votes = 0;
  barrier_.phase ^= 1;
  for (int i = 0; i < int(threads_.size()); ++i) {
    threads_[size_t(i)].state = State::kReady;
    if (i != current_) make_ready(i);
  }
}

void* Grid::static_shared(const void* key, size_t bytes, size_t alignment) {
  const sanitizer::Unseen unseen;
  for (const SharedArray& array : static_shared_) {
    if (array.key == key) return array.memory;
  }
  static_bytes_ += bytes;
  const std::string error = shared_memory_error(static_bytes_, launch_.shared_bytes);
  if (!error.empty()) abandon(place() + ": " + error);
  static_shared_.push_back({key, fresh_memory(bytes, std::max<size_t>(alignment, 16))});
  return static_shared_.back().memory;
}

}  // namespace emulator
