// A fiber: a stack, and where its execution stands.  Switching takes 15 instructions.  ucontext's
// swapcontext would add a system call for the signal mask.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "sanitizers.h"

#if !defined(__x86_64__) || !defined(__linux__)
#error "cuda_on_cpu switches stacks with x86-64 assembly: add that of this CPU"
#endif

// Push the registers that a function must preserve, store the stack pointer at *save and continue
// where the stack `load` was left.  It is assembly outside of any function, so that the compiler
// sees a call that may change all memory.  It is weak, because every source that includes this
// defines it. It ends with a jump: the CPU would predict the target of a return from the calls of
// the other stack, always wrongly.  With the jump, shuffles are a third faster.
extern "C" __attribute__((visibility("hidden"))) void cuda_on_cpu_switch(void** save, void* load);
asm(R"(
  .pushsection .text.cuda_on_cpu_switch, "axG", @progbits, cuda_on_cpu_switch, comdat
  .weak cuda_on_cpu_switch
  .hidden cuda_on_cpu_switch
  .type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmp *%rcx
  .size cuda_on_cpu_switch, . - cuda_on_cpu_switch
  .popsection
)");

namespace cuda_on_cpu {

class Fiber {
 public:
  static constexpr size_t kStackBytes = 256 << 10;  // only pages that are touched take memory
  static constexpr size_t kGuardBytes = 4096;

  // The running execution, on a stack that was not made here.
  Fiber() = default;

  // A new execution.  `entry` starts at the first switch, calls entered() and never returns.  The
  // stack is never freed: fibers are kept until the process ends.
  explicit Fiber(void (*entry)()) : tsan_thread_(sanitizers::new_thread()) {
    void* const bottom = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (bottom == MAP_FAILED || mprotect(bottom, kGuardBytes, PROT_NONE) != 0) {
      std::perror("cuda_on_cpu: no memory for the stack of a thread");
      std::abort();
    }
    stack_.bottom = bottom;
    stack_.bytes = kStackBytes;
    // As if `entry` had been called, and had switched before its first instruction.
    void** top = reinterpret_cast<void**>(static_cast<char*>(bottom) + kStackBytes);
    *--top = nullptr;  // where entry would return to; it finds the stack aligned as after a call
    *--top = reinterpret_cast<void*>(entry);
    for (int saved_register = 0; saved_register < 6; ++saved_register) *--top = nullptr;
    stack_pointer_ = top;
  }

  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void* tsan_thread() const { return tsan_thread_; }
  void adopt_running_thread() { tsan_thread_ = sanitizers::this_thread(); }

  // Leave this fiber, which must be the running one, until `other` switches back.
  void switch_to(Fiber& other) {
    sanitizers::leave_stack(stack_, other.stack_);
    sanitizers::switch_thread(other.tsan_thread_);
    cuda_on_cpu_switch(&stack_pointer_, other.stack_pointer_);
    sanitizers::enter_stack(stack_, other.stack_);
  }

  // Complete the first switch_to(*this), which `other` called.
  void entered(Fiber& other) { sanitizers::enter_stack(stack_, other.stack_); }

 private:
  void* stack_pointer_ = nullptr;  // while it does not run
  sanitizers::Stack stack_;
  void* tsan_thread_ = nullptr;
};

}  // namespace cuda_on_cpu
