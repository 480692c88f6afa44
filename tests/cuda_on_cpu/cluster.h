// The barrier of a cluster, and sends to its blocks: barrier.cluster and st.async.
#pragma once

#include "arrival_barrier.h"

namespace cuda_on_cpu {

inline void arrive_at_cluster(const char* what, bool orders_memory) {
  Thread& thread = *device.current;
  Barrier& barrier = device.cluster_barrier;
  if (thread.cluster_arrivals != thread.cluster_waits) {
    misuse("%s without a cluster_wait after the last cluster_arrive", what);
  }
  uint64_t* const order = &barrier.order[barrier.generation % 2];
  sanitizers::release(orders_memory ? order : &device.leave_order[barrier.generation % 2]);
  if (std::exchange(thread.has_fenced_inits, false)) {
    Engine* const initialiser = thread.block->initialiser.take(nullptr, 0);
    initialiser->release(order);
    thread.block->initialiser.give_back(initialiser);
  }
  ++thread.cluster_arrivals;
  thread.cluster_generation = barrier.generation;
  barrier.arrive();
}

inline void wait_for_cluster(const char* what) {
  Thread& thread = *device.current;
  Barrier& barrier = device.cluster_barrier;
  const unsigned generation = thread.cluster_generation;
  if (thread.cluster_arrivals == thread.cluster_waits) misuse("%s without cluster_arrive", what);
  if (barrier.generation == generation) wait_while(barrier.generation, generation, what);
  ++thread.cluster_waits;
  sanitizers::acquire(&barrier.order[generation % 2]);
}

// Before Hopper these do nothing, as in the kernels.
inline void cluster_arrive() {
  sanitizers::Unwatched bookkeeping;
  if (device.architecture >= 90) arrive_at_cluster("cluster_arrive", false);
}
inline void cluster_wait() {
  sanitizers::Unwatched bookkeeping;
  if (device.architecture >= 90) wait_for_cluster("cluster_wait");
}
inline void cluster_sync() {
  sanitizers::Unwatched bookkeeping;
  if (device.architecture < 90) return;
  arrive_at_cluster("cluster_sync", true);
  wait_for_cluster("cluster_sync");
}

// Prepare a send: check it and find the block that gets it.
inline Block& receiver(void* to, unsigned rank, unsigned bytes, ArrivalBarrier* b) {
  sanitizers::Unwatched bookkeeping;
  need_architecture(90, "send");
  own_offset("send", to, bytes, bytes);
  own_offset("send", b);
  if (rank >= device.cluster_size) {
    misuse("send to rank %u in a cluster of %u", rank, device.cluster_size);
  }
  Block& peer = *device.blocks[rank];
  if (peer.barrier.expected == 0)
    misuse("send to block %u, but the block exits before it", peer.index);
  return peer;
}

template <int n>
__attribute__((noinline)) void send(uint32_t* to, unsigned rank, const uint32_t (&words)[n],
                                    ArrivalBarrier* b) {
  static_assert(n == 2 || n == 4, "a send has 8 or 16 bytes");
  Block& peer = receiver(to, rank, sizeof(words), b);
  Copy copy{};
  std::memcpy(copy.words, words, sizeof(words));
  const SharedMemory& own = device.current->block->memory;
  const size_t offset = own.offset_of(b);
  const uint64_t state = reinterpret_cast<ArrivalBarrier*>(peer.memory.at(offset))->state;

  sanitizers::Unwatched bookkeeping;
  Thread& thread = *device.current;
  copy.barrier = peer.arrival_barriers.find(offset, state);
  if (!copy.barrier) misuse("send to block %u, which has not initialised the barrier", peer.index);
  if (!copy.barrier->fenced) {
    misuse("send to block %u, which has not called barrier_init_fence", peer.index);
  }
  if (&peer != thread.block && thread.cluster_waits < copy.barrier->seen_after) {
    misuse("send to block %u without cluster_wait after its barrier_init_fence", peer.index);
  }
  copy.what = "send";
  copy.issuer = &thread;
  copy.site = FD_SITE;
  copy.block = &peer;
  copy.to = peer.memory.at(own.offset_of(to));
  copy.bytes = sizeof(words);
  sanitizers::release(&thread.issued);
  request(copy, &thread.issued);
}

}  // namespace cuda_on_cpu
