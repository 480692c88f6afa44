// Copies of 16 bytes, which the thread that asked for them waits for: cp.async.
#pragma once

#include "arrival_barrier.h"

namespace cuda_on_cpu {

inline void land(SmallCopy& copy) {
  if (copy.landed) return;
  copy.landed = true;
  std::memcpy(copy.to, copy.from, 16);
  copy.engine->read(copy.from, 16, copy.site);
  copy.engine->write(copy.to, 16, copy.site);
}

__attribute__((noinline)) inline void copy_16(void* shared, const void* global) {
  sanitizers::Unwatched bookkeeping;
  need_architecture(80, "copy_16");
  own_offset("copy_16", shared, 16, 16);
  check_source("copy_16", global, 16);
  SmallCopies& own = device.current->small_copies;
  if (!own.engine) own.engine = own.engines.take(device.scheduler.tsan_thread(), 0);
  SmallCopy copy{shared, global, own.group, own.engine, FD_SITE};
  sanitizers::release(&own.issued);
  copy.engine->acquire(&own.issued);
  std::memset(shared, kNotLanded, 16);
  copy.engine->write(shared, 16, copy.site);
  if (device.landing.eager || (device.landing.random && device.landing.below(4) == 0)) land(copy);
  own.pending.push_back(copy);
}

inline void copies_commit() {
  sanitizers::Unwatched bookkeeping;
  need_architecture(80, "copies_commit");
  SmallCopies& own = device.current->small_copies;
  own.engine = nullptr;
  ++own.group;
}

// Wait for all but the latest n groups.  They land now: no thread can rely on it any earlier.
inline void wait_for_small_copies(unsigned n) {
  sanitizers::Unwatched bookkeeping;
  need_architecture(80, "copies_wait");
  SmallCopies& own = device.current->small_copies;
  std::vector<SmallCopy>& pending = own.pending;
  size_t count = 0;
  while (count < pending.size() && pending[count].group + n < own.group) ++count;
  // In reverse order the later groups land too, before those that are waited for.
  if (device.landing.reverse)
    std::for_each(pending.rbegin(), pending.rend(), [](SmallCopy& c) { land(c); });
  for (size_t i = 0; i < count; ++i) {
    land(pending[i]);
    if (i + 1 < count && pending[i + 1].engine == pending[i].engine) continue;
    pending[i].engine->release(&own.landed);
    own.engines.give_back(pending[i].engine);
  }
  pending.erase(pending.begin(), pending.begin() + std::ptrdiff_t(count));
  sanitizers::acquire(&own.landed);
}

template <int n>
void copies_wait() {
  static_assert(n >= 0);
  wait_for_small_copies(n);
}

// Check that the current thread leaves nothing half done.
inline void check_exit() {
  Thread& thread = *device.current;
  if (!thread.small_copies.pending.empty()) {
    misuse("the thread exits with copy_16 under way: no copies_wait came after them");
  }
  if (thread.cluster_arrivals != thread.cluster_waits) {
    misuse("the thread exits between cluster_arrive and cluster_wait");
  }
}

}  // namespace cuda_on_cpu
