// Threads, warps and blocks, and what they wait at.
#pragma once

#include <array>
#include <cstdint>
#include <memory>

#include "engine.h"
#include "fiber.h"
#include "phases.h"
#include "small_copies.h"
#include "shared_memory.h"
#include "warp.h"

namespace cuda_on_cpu {

constexpr unsigned kMaxThreads = 1024;  // of a block
constexpr unsigned kMaxCluster = 8;     // blocks; more need an attribute that no launch here sets

struct Block {
  unsigned index = 0;  // blockIdx.x
  unsigned rank = 0;   // in its cluster
  Barrier barrier;     // expects the threads that live
  uint64_t exits = 0;  // for TSan: what threads did before they exited
  SharedMemory memory;
  std::array<Warp, kMaxThreads / kWarpSize> warps;
  BarrierTable arrival_barriers;
  Engines initialiser;  // one, which writes the initial state of those

  // Prepare for threads 0 to n - 1.
  void start(unsigned block_index, unsigned cluster_rank, unsigned n, const SharedLayout& layout) {
    index = block_index;
    rank = cluster_rank;
    barrier.expected = n;
    for (unsigned first = 0; first < n; first += kWarpSize) {
      const unsigned lanes = n - first < kWarpSize ? n - first : kWarpSize;
      warps[first / kWarpSize].live = ~0u >> (kWarpSize - lanes);
    }
    memory.open(layout);
    arrival_barriers.clear();
  }
};

// A CUDA thread.  After this block its fiber runs a thread of the next block.
struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  unsigned index = 0;  // threadIdx.x
  bool done = true;

  // If it waits, then for *counter to be another number.
  const unsigned* counter = nullptr;
  unsigned number = 0;
  const char* where = "";

  // The cluster's barriers at which it has arrived, and those that it is past.
  unsigned cluster_arrivals = 0, cluster_waits = 0;
  unsigned cluster_generation = 0;  // when it last arrived
  bool has_fenced_inits = false;    // since it last arrived

  SmallCopies small_copies;
  Engines engines;      // for its other copies
  uint64_t fence = 0;   // for TSan: what came before its last fence_before_copy()
  uint64_t issued = 0;  // for TSan: what came before an operation that it issued

  explicit Thread(void (*entry)()) : fiber(entry) {}

  void start(Block* b, unsigned i) {
    block = b;
    index = i;
    done = false;
    cluster_arrivals = cluster_waits = 0;
    has_fenced_inits = false;
  }
  bool ready() const { return !done && (!counter || *counter != number); }
  unsigned lane() const { return index % kWarpSize; }
  Warp& warp() const { return block->warps[index / kWarpSize]; }
};

}  // namespace cuda_on_cpu
