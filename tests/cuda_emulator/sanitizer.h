// What the emulator tells the sanitizers. It is built without their instrumentation: what it does to
// its own data, and to the records that lanes exchange, is no concern of theirs. What it does for a
// kernel is declared here by hand.
#pragma once
#include <cstddef>

#ifdef EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#endif
#ifdef EMULATOR_TSAN
#include <sanitizer/tsan_interface.h>
extern "C" {
void __tsan_read_range(void* address, unsigned long bytes);
void __tsan_write_range(void* address, unsigned long bytes);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace emulator::sanitizer {

#ifdef EMULATOR_TSAN
constexpr bool kChecksRaces = true;
// Whatever is done before a release happens before what follows a later acquire of the same address.
inline void release(void* address) { __tsan_release(address); }
inline void acquire(void* address) { __tsan_acquire(address); }
inline void note_read(const void* address, size_t bytes) {
  __tsan_read_range(const_cast<void*>(address), bytes);
}
inline void note_write(void* address, size_t bytes) { __tsan_write_range(address, bytes); }

// While one lives, what this thread does is neither recorded nor checked.
class Unseen {
 public:
  Unseen() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
  Unseen(const Unseen&) = delete;
  Unseen& operator=(const Unseen&) = delete;
};
#else
constexpr bool kChecksRaces = false;
inline void release(void*) {}
inline void acquire(void*) {}
inline void note_read(const void*, size_t) {}
inline void note_write(void*, size_t) {}
struct Unseen {
  Unseen() {}
  ~Unseen() {}
};
#endif

#ifdef EMULATOR_ASAN
inline bool is_outside_allocations(const void* address, size_t bytes) {
  return __asan_region_is_poisoned(const_cast<void*>(address), bytes) != nullptr;
}
#else
inline bool is_outside_allocations(const void*, size_t) { return false; }
#endif

}  // namespace emulator::sanitizer
