// The device, one per process, and what CUDA threads do that concerns other threads.
#pragma once

#include <cstdarg>
#include <deque>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#include "block.h"
#include "landing.h"

namespace cuda_on_cpu {

struct Index {
  unsigned x = 0;
};

// A copy that was asked for: a part of the memory of a block gets other bytes.
struct Copy {
  const char* what;
  Thread* issuer;
  const void* site;  // the place in the kernel
  Block* block;
  char* to;
  unsigned bytes;
  const char* from;   // null: the words
  uint32_t words[4];  // of a send
  Phases* barrier;    // of the block
  Engine* engine = nullptr;
};

struct Device {
  // The launch
  const std::function<void()>* body = nullptr;
  unsigned threads_per_block = 0, cluster_size = 0;
  size_t allowed_shared = 0;  // bytes that the next launch may ask for beyond the default
  SharedLayout layout;
  int architecture = 0;
  uint64_t order = 0;  // for TSan: the host, and blocks that run one after the other

  // The cluster that runs
  Barrier cluster_barrier;       // expects the threads that live
  uint64_t leave_order[2] = {};  // for TSan: what came before arrivals that order no memory
  std::deque<Copy> in_flight;
  Landing landing;
  Thread* current = nullptr;
  Fiber scheduler;

  // Kept between launches; the first few are in use.  Threads lie block by block.
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::unique_ptr<Thread>> threads;
};
inline Device device;

}  // namespace cuda_on_cpu

// The indices of the current thread.  The kernels of this project are one-dimensional.
inline cuda_on_cpu::Index threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

// Stop: the current thread did what no CUDA thread may do.
[[noreturn]] __attribute__((format(printf, 1, 2))) inline void misuse(const char* format, ...) {
  const Thread& thread = *device.current;
  std::fprintf(stderr, "cuda_on_cpu: block %u, thread %u (warp %u, lane %u): ", thread.block->index,
               thread.index, thread.index / kWarpSize, thread.lane());
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fputc('\n', stderr);
  std::abort();
}

// --- waiting.  Callers are Unwatched, because the bookkeeping is not memory of the kernel.

// Wait for the counter to be another number.
inline void wait_while(const unsigned& counter, unsigned number, const char* where) {
  Thread& thread = *device.current;
  thread.counter = &counter;
  thread.number = number;
  thread.where = where;
  thread.fiber.switch_to(device.scheduler);
  thread.counter = nullptr;
}

inline void wait_at(Barrier& barrier, const char* where, bool orders_memory = true) {
  const unsigned generation = barrier.generation;
  if (orders_memory) sanitizers::release(&barrier.order[generation % 2]);
  if (!barrier.arrive()) wait_while(barrier.generation, generation, where);
  if (orders_memory) sanitizers::acquire(&barrier.order[generation % 2]);
}

// Wait for the other lanes; return their values.
inline const LaneGroup::Exchange& exchange(const char* what, unsigned mask, uint64_t value,
                                           bool orders_memory) {
  const Thread& thread = *device.current;
  Warp& warp = thread.warp();
  if (!(mask >> thread.lane() & 1)) misuse("%s with mask %08x, which lacks the lane", what, mask);
  LaneGroup& group = warp.group(mask);
  LaneGroup::Exchange& lanes = group.latest();
  const bool first = group.barrier.arrived == 0;
  if (first) {
    group.what = what;
    group.barrier.expected = unsigned(__builtin_popcount(mask & warp.live));
    lanes.lanes = 0;
    ++warp.waiting;
  }
  const LaneGroup* other = nullptr;
  if (warp.waiting > 1) other = warp.waiting_for_each_other(thread.lane(), mask);
  if (!first && group.what != what && std::strcmp(group.what, what) != 0) other = &group;
  if (other) {
    misuse("%s with mask %08x, but other lanes of the warp wait at %s with mask %08x", what, mask,
           other->what, other->mask);
  }
  lanes.lanes |= 1u << thread.lane();
  lanes.value[thread.lane()] = value;
  ++group.inside;
  if (group.barrier.arrived + 1 == group.barrier.expected) --warp.waiting;
  wait_at(group.barrier, what, orders_memory);
  --group.inside;
  return lanes;
}

// --- barriers and shuffles

inline void block_sync() {
  sanitizers::Unwatched bookkeeping;
  wait_at(device.current->block->barrier, "__syncthreads");
}

inline void warp_sync(unsigned mask) {
  sanitizers::Unwatched bookkeeping;
  exchange("__syncwarp", mask, 0, true);
}

// Whether TSan takes shuffles to order memory.  CUDA does not promise it.
constexpr bool kShufflesOrderMemory = false;

// `source` maps a lane to the one whose value it gets.
template <class T, class Source>
T shuffle(const char* what, unsigned mask, T value, Source source) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8),
                "shuffles move 4 or 8 bytes");
  sanitizers::Unwatched bookkeeping;
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const LaneGroup::Exchange& lanes = exchange(what, mask, bits, kShufflesOrderMemory);
  const unsigned from = source(device.current->lane());
  if (from >= kWarpSize || !(lanes.lanes >> from & 1)) {
    misuse("%s from lane %u, which does not exist or has exited", what, from);
  }
  std::memcpy(&value, &lanes.value[from], sizeof(T));
  return value;
}

inline unsigned cluster_rank() {
  sanitizers::Unwatched bookkeeping;
  return device.current->block->rank;
}

// --- shared memory

template <class T>
T* static_shared(const void* site, size_t n) {
  static_assert(alignof(T) <= 16, "shared memory is aligned to 16 bytes");
  sanitizers::Unwatched bookkeeping;
  const Slot* slot = device.layout.find(site);
  if (!slot) {
    slot = &device.layout.add_static(site, n * sizeof(T));
    for (unsigned i = 0; i < device.cluster_size; ++i) device.blocks[i]->memory.open(*slot);
  }
  return reinterpret_cast<T*>(device.current->block->memory.at(*slot));
}

inline unsigned char* dynamic_shared() {
  sanitizers::Unwatched bookkeeping;
  const Block& block = *device.current->block;
  return reinterpret_cast<unsigned char*>(block.memory.at(device.layout.dynamic()));
}

template <class T>
T* peer(T* p, unsigned rank) {
  sanitizers::Unwatched bookkeeping;
  const size_t offset = device.current->block->memory.offset_of(p);
  if (offset == SharedLayout::kArena) misuse("cluster_peer of memory that is not shared");
  if (rank >= device.cluster_size) {
    misuse("cluster_peer of rank %u in a cluster of %u", rank, device.cluster_size);
  }
  return reinterpret_cast<T*>(device.blocks[rank]->memory.at(offset));
}

}  // namespace cuda_on_cpu
