// Stacks to switch between on one thread of the operating system.
#pragma once
#include <cstddef>

#ifdef __x86_64__
#define EMULATOR_SWITCHES_BY_HAND
#else
#include <ucontext.h>
#endif

namespace emulator {

class Fiber {
 public:
  // The stack that the caller runs on.
  Fiber() = default;
  // A stack of its own; the first switch to it calls `entry`, which never returns. Never freed: fibers
  // are kept for the launches to come.
  static Fiber* make(void (*entry)());

  // Forgets what the fiber was doing; the next switch to it calls `entry` anew.
  void restart(void (*entry)());

  // Goes on where `to` was left. Returns when another fiber switches back here.
  void switch_to(Fiber& to);

  // Of the stack that the caller runs on: takes the identity that the race checker knows it by.
  void adopt_thread();

 private:
  static void arrive(void* fake_stack);
  static void first_arrival();

  char* stack_ = nullptr;  // its lowest byte, above a page that can't be touched
  size_t stack_bytes_ = 0;
  void (*entry_)() = nullptr;
  void* identity_ = nullptr;  // as the race checker calls it
#ifdef EMULATOR_SWITCHES_BY_HAND
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_ = {};
#endif
};

}  // namespace emulator
