// Barriers in shared memory that count arrivals and bytes: mbarrier.
#pragma once

#include "copies.h"

#define FD_SITE __builtin_return_address(0)  // the place in the kernel that calls this function

// Its state is a number in the block's table of barriers.
struct alignas(8) ArrivalBarrier {
  uint64_t state;
};

namespace cuda_on_cpu {

inline void need_architecture(int least, const char* what) {
  if (device.architecture < least) misuse("%s needs sm_%d", what, least);
}

// Return the offset of bytes that must lie in an array in the shared memory of the current block.
inline size_t own_offset(const char* what, void* p, size_t bytes, size_t alignment) {
  const size_t offset = device.current->block->memory.offset_of(p);
  if (uintptr_t(p) % alignment != 0) {
    misuse("%s: %p is not aligned to %zu bytes", what, p, alignment);
  }
  if (offset != SharedLayout::kArena) sanitizers::probe_write(p, bytes);
  if (!device.layout.holds(offset, bytes)) {
    misuse("%s: %zu bytes at %p are not in an array of the block", what, bytes, p);
  }
  return offset;
}
inline size_t own_offset(const char* what, ArrivalBarrier* b) {
  return own_offset(what, b, sizeof(*b), alignof(ArrivalBarrier));
}

// Check bytes of global memory that a copy reads.
inline void check_source(const char* what, const void* p, size_t bytes) {
  if (uintptr_t(p) % 16 != 0) misuse("%s: %p is not aligned to 16 bytes", what, p);
  if (device.current->block->memory.offset_of(p) != SharedLayout::kArena) {
    misuse("%s: %p is not in global memory", what, p);
  }
  sanitizers::probe_read(p, bytes);
}

// Return the barrier of the current thread's block.  The kernel reads the state, so that the
// sanitizers see whether it may.
inline Phases& own_barrier(const char* what, ArrivalBarrier* b) {
  size_t offset;
  {
    sanitizers::Unwatched bookkeeping;
    offset = own_offset(what, b);
  }
  const uint64_t state = b->state;
  sanitizers::Unwatched bookkeeping;
  Phases* const barrier = device.current->block->arrival_barriers.find(offset, state);
  if (!barrier) misuse("%s: the barrier is not initialised", what);
  return *barrier;
}

__attribute__((noinline)) inline void barrier_init(ArrivalBarrier* b, unsigned arrivals) {
  sanitizers::Unwatched bookkeeping;
  Block& block = *device.current->block;
  const size_t offset = own_offset("barrier_init", b);
  if (arrivals == 0 || arrivals > kMaxPendingBytes) misuse("barrier_init of %u arrivals", arrivals);
  if (block.arrival_barriers.find(offset)) misuse("barrier_init of a barrier that is in use");
  b->state = block.arrival_barriers.add(offset, arrivals, device.current);
  Phases& barrier = *block.arrival_barriers.find(offset);

  // To TSan another thread writes it, so that a fence can order that write alone.
  Engine* const initialiser = block.initialiser.take(device.scheduler.tsan_thread(), 0);
  initialiser->acquire(&device.order);
  initialiser->write(b, sizeof(*b), FD_SITE);
  initialiser->release(&barrier.initialised);
  block.initialiser.give_back(initialiser);
  sanitizers::acquire(&barrier.initialised);
}

inline void barrier_init_fence() {
  sanitizers::Unwatched bookkeeping;
  Thread& thread = *device.current;
  need_architecture(90, "barrier_init_fence");
  thread.block->arrival_barriers.each([&](Phases& barrier) {
    if (barrier.initialiser != &thread || barrier.fenced) return;
    barrier.fenced = true;
    barrier.seen_after = thread.cluster_arrivals + 1;
    thread.has_fenced_inits = true;
  });
}

inline void arrive(const char* what, Phases& barrier, unsigned bytes) {
  if (barrier.pending_arrivals == 0) {
    misuse("%s: all %u arrivals of the phase have come before", what, barrier.arrivals);
  }
  barrier.pending_bytes += bytes;
  if (barrier.pending_bytes > kMaxPendingBytes) {
    misuse("%s: the phase expects %lld bytes, more than %lld", what,
           static_cast<long long>(barrier.pending_bytes), static_cast<long long>(kMaxPendingBytes));
  }
  sanitizers::release(barrier.current_order());
  --barrier.pending_arrivals;
  barrier.advance();
}

inline void barrier_expect(ArrivalBarrier* b, unsigned bytes) {
  Phases& barrier = own_barrier("barrier_expect", b);
  sanitizers::Unwatched bookkeeping;
  need_architecture(90, "barrier_expect");
  arrive("barrier_expect", barrier, bytes);
}

inline void barrier_arrive(ArrivalBarrier* b) {
  Phases& barrier = own_barrier("barrier_arrive", b);
  sanitizers::Unwatched bookkeeping;
  arrive("barrier_arrive", barrier, 0);
}

inline void barrier_wait(ArrivalBarrier* b, unsigned parity) {
  Phases& barrier = own_barrier("barrier_wait", b);
  sanitizers::Unwatched bookkeeping;
  need_architecture(90, "barrier_wait");
  if (parity > 1) misuse("barrier_wait of parity %u", parity);
  while (barrier.phase % 2 == parity) wait_while(barrier.phase, barrier.phase, "barrier_wait");
  barrier.awaited = barrier.phase;
  sanitizers::acquire(&barrier.order[parity]);
}

}  // namespace cuda_on_cpu
