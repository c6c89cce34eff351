#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <stdexcept>

#include "sanitizer.h"

#ifdef EMULATOR_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {
namespace {

// A thread's copy of 32 KB of launch parameters must fit, several times.
#if defined(EMULATOR_ASAN) || defined(EMULATOR_TSAN)
constexpr size_t kStackBytes = size_t(512) * 1024;
#else
constexpr size_t kStackBytes = size_t(256) * 1024;
#endif

// Who switched to whom last.
Fiber* switched_from = nullptr;
Fiber* switched_to = nullptr;

#ifdef EMULATOR_SWITCHES_BY_HAND
// Saves the registers that a callee must keep on this stack and its pointer in *save, then takes
// `load` for the stack pointer and does the reverse. A jump instead of a return: the processor's
// prediction of returns would be wrong each time. noipa: no caller may know what is left alone here.
__attribute__((naked, noipa)) void switch_stack(void** /*save*/, void* /*load*/) {
  asm volatile(
      "pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15;"
      "movq %rsp, (%rdi); movq %rsi, %rsp;"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; popq %rcx; jmp *%rcx");
}
#endif

}  // namespace

Fiber* Fiber::make(void (*entry)()) {
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  void* const memory = mmap(nullptr, page + kStackBytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) {
    throw std::runtime_error("the emulator can't get a stack");
  }
  Fiber* const fiber = new Fiber;
  fiber->stack_ = static_cast<char*>(memory) + page;
  fiber->stack_bytes_ = kStackBytes;
#ifdef EMULATOR_TSAN
  fiber->identity_ = __tsan_create_fiber(0);
#endif
  fiber->restart(entry);
  return fiber;
}

void Fiber::restart(void (*entry)()) {
  entry_ = entry;
#ifdef EMULATOR_ASAN
  __asan_unpoison_memory_region(stack_, stack_bytes_);
#endif
#ifdef EMULATOR_SWITCHES_BY_HAND
  // From the top: a return address of nothing, which ends backtraces and leaves the stack as a call
  // leaves it; where to go; six registers.
  void** top = reinterpret_cast<void**>(stack_ + stack_bytes_);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&first_arrival);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  stack_pointer_ = static_cast<void*>(top);
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = stack_bytes_;
  context_.uc_link = nullptr;
  makecontext(&context_, first_arrival, 0);
#endif
}

void Fiber::switch_to(Fiber& to) {
  switched_from = this;
  switched_to = &to;
  void* fake_stack = nullptr;
#ifdef EMULATOR_TSAN
  __tsan_switch_to_fiber(to.identity_, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef EMULATOR_ASAN
  __sanitizer_start_switch_fiber(&fake_stack, to.stack_, to.stack_bytes_);
#endif
#ifdef EMULATOR_SWITCHES_BY_HAND
  switch_stack(&stack_pointer_, to.stack_pointer_);
#else
  swapcontext(&context_, &to.context_);
#endif
  arrive(fake_stack);
}

// What was left may be the launching thread's stack, whose bounds only the sanitizer knows.
void Fiber::arrive([[maybe_unused]] void* fake_stack) {
#ifdef EMULATOR_ASAN
  const void* left_stack = nullptr;
  size_t left_bytes = 0;
  __sanitizer_finish_switch_fiber(fake_stack, &left_stack, &left_bytes);
  switched_from->stack_ = static_cast<char*>(const_cast<void*>(left_stack));
  switched_from->stack_bytes_ = left_bytes;
#endif
}

void Fiber::first_arrival() {
  arrive(nullptr);
  switched_to->entry_();
  __builtin_trap();
}

void Fiber::adopt_thread() {
#ifdef EMULATOR_TSAN
  identity_ = __tsan_get_current_fiber();
#endif
}

}  // namespace emulator
