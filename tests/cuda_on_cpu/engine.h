// A copy engine: to TSan a thread that makes one copy, whatever thread of the kernel asked for it.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "sanitizers.h"

namespace cuda_on_cpu {

#ifdef __SANITIZE_THREAD__

// Not instrumented, because it runs on the stack of another TSan thread.
#define FD_UNWATCHED __attribute__((no_sanitize_thread, noinline))
#define FD_INLINE_UNWATCHED __attribute__((no_sanitize_thread, always_inline)) inline

// What it does is ordered after what it acquires, and before what acquires it.
class Engine {
 public:
  // A new engine is ordered after what `ancestor` knows of, a TSan thread.
  FD_UNWATCHED explicit Engine(void* ancestor) {
    const Turn turn(ancestor);
    thread_ = __tsan_create_fiber(0);
    __tsan_set_fiber_name(thread_, "copy engine");
  }
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  FD_UNWATCHED void acquire(void* order) {
    const Turn turn(thread_);
    __tsan_acquire(order);
  }
  FD_UNWATCHED void release(void* order) {
    const Turn turn(thread_);
    __tsan_release(order);
  }
  // A report names `site`, the place in the kernel.
  FD_UNWATCHED void read(const void* p, size_t bytes, const void* site) {
    const Turn turn(thread_);
    __tsan_func_entry(site);
    __tsan_read_range(p, bytes);
    __tsan_func_exit();
  }
  FD_UNWATCHED void write(void* p, size_t bytes, const void* site) {
    const Turn turn(thread_);
    __tsan_func_entry(site);
    __tsan_write_range(p, bytes);
    __tsan_func_exit();
  }

 private:
  // While it exists, TSan takes what runs for another thread.
  class Turn {
   public:
    FD_INLINE_UNWATCHED explicit Turn(void* thread) : running_(__tsan_get_current_fiber()) {
      __tsan_switch_to_fiber(thread, __tsan_switch_to_fiber_no_sync);
    }
    FD_INLINE_UNWATCHED ~Turn() {
      __tsan_switch_to_fiber(running_, __tsan_switch_to_fiber_no_sync);
    }

   private:
    void* running_;
  };

  void* thread_;
};

// The engines of one thread of the kernel.  Others would bring along what their threads know.
class Engines {
 public:
  // An engine knows of its last copy.  So those that were used last wait until `spare` are free.
  Engine* take(void* ancestor, size_t spare) {
    if (free_.size() <= spare) {
      all_.push_back(std::make_unique<Engine>(ancestor));
      return all_.back().get();
    }
    Engine* const first = free_.front();
    free_.erase(free_.begin());
    return first;
  }
  void give_back(Engine* engine) { free_.push_back(engine); }

 private:
  std::vector<std::unique_ptr<Engine>> all_;
  std::vector<Engine*> free_;
};

#else

struct Engine {
  void acquire(void*) {}
  void release(void*) {}
  void read(const void*, size_t, const void*) {}
  void write(void*, size_t, const void*) {}
};
struct Engines {
  Engine only;
  Engine* take(void*, size_t) { return &only; }
  void give_back(Engine*) {}
};

#endif

}  // namespace cuda_on_cpu
