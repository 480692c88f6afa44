// Tells the sanitizers about fibers, shared memory and barriers.  Without sanitizers it does
// nothing.
#pragma once

#include <cstddef>

#if defined(__has_feature)  // clang spells these differently
#if __has_feature(address_sanitizer) && !defined(__SANITIZE_ADDRESS__)
#define __SANITIZE_ADDRESS__ 1
#endif
#if __has_feature(thread_sanitizer) && !defined(__SANITIZE_THREAD__)
#define __SANITIZE_THREAD__ 1
#endif
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
extern "C" {
void __tsan_ignore_thread_begin();  // in the library, but in no header
void __tsan_ignore_thread_end();
void __tsan_func_entry(const void* call);
void __tsan_func_exit();
void __tsan_read_range(const void* p, unsigned long bytes);
void __tsan_write_range(void* p, unsigned long bytes);
}
#endif

namespace cuda_on_cpu::sanitizers {

// --- AddressSanitizer: which stack is in use, and which memory may be accessed

struct Stack {
  const void* bottom = nullptr;
  size_t bytes = 0;
  void* fake = nullptr;  // ASan's shadow of it, while the stack is not in use
};

#ifdef __SANITIZE_ADDRESS__
inline void leave_stack(Stack& from, const Stack& to) {
  __sanitizer_start_switch_fiber(&from.fake, to.bottom, to.bytes);
}
inline void enter_stack(const Stack& now, Stack& came_from) {
  __sanitizer_finish_switch_fiber(now.fake, &came_from.bottom, &came_from.bytes);
}
inline void poison(const void* p, size_t bytes) { __asan_poison_memory_region(p, bytes); }
inline void unpoison(const void* p, size_t bytes) { __asan_unpoison_memory_region(p, bytes); }

// Access the first byte of the range that must not be accessed, so that ASan reports it.
inline void probe_read(const void* p, size_t bytes) {
  void* const bad = __asan_region_is_poisoned(const_cast<void*>(p), bytes);
  if (bad) (void)*static_cast<volatile const char*>(bad);
}
inline void probe_write(void* p, size_t bytes) {
  void* const bad = __asan_region_is_poisoned(p, bytes);
  if (bad) *static_cast<volatile char*>(bad) = 0;
}
#else
inline void leave_stack(Stack&, const Stack&) {}
inline void enter_stack(const Stack&, Stack&) {}
inline void poison(const void*, size_t) {}
inline void unpoison(const void*, size_t) {}
inline void probe_read(const void*, size_t) {}
inline void probe_write(void*, size_t) {}
#endif

// --- ThreadSanitizer: each fiber is a thread, and only release() and acquire() order the accesses
// of two of them.  Switching fibers orders nothing, although all run on one OS thread.  So TSan
// detects races of CUDA threads.

#ifdef __SANITIZE_THREAD__
inline void* new_thread() { return __tsan_create_fiber(0); }
inline void* this_thread() { return __tsan_get_current_fiber(); }
inline void switch_thread(void* to) { __tsan_switch_to_fiber(to, __tsan_switch_to_fiber_no_sync); }
inline void release(void* order) { __tsan_release(order); }
inline void acquire(void* order) { __tsan_acquire(order); }

// While one exists, TSan ignores what its fiber reads and writes: the bookkeeping of this folder.
struct Unwatched {
  Unwatched() { __tsan_ignore_thread_begin(); }
  ~Unwatched() { __tsan_ignore_thread_end(); }
  Unwatched(const Unwatched&) = delete;
  Unwatched& operator=(const Unwatched&) = delete;
};
#else
inline void* new_thread() { return nullptr; }
inline void* this_thread() { return nullptr; }
inline void switch_thread(void*) {}
inline void release(void*) {}
inline void acquire(void*) {}
struct Unwatched {
  Unwatched() {}  // not trivial, or an object of it would be an unused variable
};
#endif

}  // namespace cuda_on_cpu::sanitizers
