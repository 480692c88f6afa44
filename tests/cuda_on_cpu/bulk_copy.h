// Copies of many bytes: cp.async.bulk.
#pragma once

#include "arrival_barrier.h"

namespace cuda_on_cpu {

__attribute__((noinline)) inline void copy_bulk(void* shared, const void* global, unsigned bytes,
                                                ArrivalBarrier* b) {
  Phases& barrier = own_barrier("copy_bulk", b);
  sanitizers::Unwatched bookkeeping;
  Thread& thread = *device.current;
  need_architecture(90, "copy_bulk");
  if (bytes == 0 || bytes % 16 != 0) misuse("copy_bulk of %u bytes: 16, 32, ... are valid", bytes);
  own_offset("copy_bulk", shared, bytes, 16);
  check_source("copy_bulk", global, bytes);
  if (!barrier.fenced) misuse("copy_bulk: barrier_init without barrier_init_fence after it");
  Copy copy{};
  copy.what = "copy_bulk";
  copy.issuer = &thread;
  copy.site = FD_SITE;
  copy.block = thread.block;
  copy.to = static_cast<char*>(shared);
  copy.from = static_cast<const char*>(global);
  copy.bytes = bytes;
  copy.barrier = &barrier;
  request_in_parts(copy, &thread.fence);
}

// Let copies that the thread asks for later come after what it did, or was ordered after.
inline void fence_before_copy() {
  sanitizers::Unwatched bookkeeping;
  need_architecture(90, "fence_before_copy");
  sanitizers::release(&device.current->fence);
}

}  // namespace cuda_on_cpu
