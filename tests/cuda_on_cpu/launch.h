// Runs a launch, cluster by cluster.
#pragma once

#include <utility>

#include "async.h"
#include "scheduler.h"

namespace cuda_on_cpu {

// End the current thread.
inline void exit_thread() {
  Thread& thread = *device.current;
  Block& block = *thread.block;
  bool last;
  {
    sanitizers::Unwatched bookkeeping;
    check_exit();
    sanitizers::release(&block.exits);
    thread.done = true;
    thread.warp().leave(thread.lane());
    block.barrier.leave();
    device.cluster_barrier.leave();
    last = block.barrier.expected == 0;
    if (last) check_exit_of_block();
  }
  if (last) {
    sanitizers::acquire(&block.exits);
    // Other blocks have read this one's memory before they arrived at the cluster's last barrier.
    if (thread.cluster_waits)
      sanitizers::acquire(&device.leave_order[thread.cluster_generation % 2]);
    block.memory.close(device.layout);
    sanitizers::release(&device.order);
  }
  sanitizers::Unwatched bookkeeping;
  thread.fiber.switch_to(device.scheduler);
}

// Every fiber runs this: a thread of this block, then one of the next.
inline void thread_main() {
  {
    sanitizers::Unwatched bookkeeping;
    device.current->fiber.entered(device.scheduler);
  }
  for (;;) {
    sanitizers::acquire(&device.order);
    (*device.body)();
    exit_thread();
  }
}

// Check the rules that a GPU has for every launch.
inline void check_launch(unsigned blocks, unsigned threads, unsigned cluster) {
  const char* trouble = nullptr;
  if (device.body) trouble = "second simultaneous";
  if (!blocks || blocks > INT32_MAX || !threads || threads > kMaxThreads) trouble = "impossible";
  if (!cluster || cluster > kMaxCluster || blocks % cluster != 0) trouble = "impossible";
  if (cluster > 1 && architecture() < 90) trouble = "impossible before sm_90:";
  if (!trouble) return;
  std::fprintf(stderr, "cuda_on_cpu: %s launch of %u blocks of %u threads, clusters of %u\n",
               trouble, blocks, threads, cluster);
  std::abort();
}

// Allow the next launch this many bytes of dynamic shared memory, as cudaFuncSetAttribute with
// cudaFuncAttributeMaxDynamicSharedMemorySize does.  CUDA remembers the value for the kernel.  Here
// it holds for one launch, so that a launch that does not ask is noticed.
inline void allow_dynamic_shared(size_t bytes) { device.allowed_shared = bytes; }

// Let every CUDA thread execute body(), which calls a kernel.  `cluster` is the number of blocks of
// a cluster; 1: there are no clusters.
inline void launch(unsigned blocks, unsigned threads, unsigned cluster, size_t shared_bytes,
                   const std::function<void()>& body) {
  sanitizers::Unwatched bookkeeping;
  check_launch(blocks, threads, cluster);
  device.body = &body;
  device.threads_per_block = blockDim.x = threads;
  gridDim.x = blocks;
  device.cluster_size = cluster;
  device.architecture = architecture();
  device.landing = Landing();
  device.layout.reset(shared_bytes, std::exchange(device.allowed_shared, 0));
  device.scheduler.adopt_running_thread();
  while (device.blocks.size() < cluster) device.blocks.push_back(std::make_unique<Block>());
  while (device.threads.size() < cluster * threads) {
    device.threads.push_back(std::make_unique<Thread>(thread_main));
  }

  Scheduler scheduler;
  for (unsigned done = 0; done < blocks; done += cluster) {
    const unsigned first = scheduler.reverse() ? blocks - cluster - done : done;
    for (unsigned rank = 0; rank < cluster; ++rank) {
      Block& block = *device.blocks[rank];
      block.start(first + rank, rank, threads, device.layout);
      for (unsigned i = 0; i < threads; ++i) device.threads[rank * threads + i]->start(&block, i);
    }
    device.cluster_barrier.expected = cluster * threads;
    sanitizers::release(&device.order);
    scheduler.run_cluster();
    sanitizers::acquire(&device.order);
  }
  device.current = nullptr;
  device.body = nullptr;
}

}  // namespace cuda_on_cpu
