// Threads, warps and blocks, and what they wait at.
#pragma once

#include <array>
#include <cstdint>

#include "fiber.h"
#include "shared_memory.h"

namespace cuda_on_cpu {

constexpr unsigned kWarpSize = 32;
constexpr unsigned kMaxThreads = 1024;  // of a block
constexpr unsigned kMaxCluster = 16;    // blocks; 8 on a device that was not asked for more

// Opens when all expected threads have arrived.  Threads that exit are no longer expected.
struct Barrier {
  unsigned expected = 0, arrived = 0;
  unsigned generation = 0;  // how often it has opened
  // The addresses by which TSan knows the order of threads.  A fast thread may arrive at the next
  // barrier before a slow one has left this one.  The slow one must not be ordered after what the
  // fast one did in between, so two addresses alternate.  No thread can be two barriers ahead.
  uint64_t order[2] = {};

  // Return whether this was the last one.
  bool arrive() { return ++arrived == expected && (open(), true); }
  void leave() {
    if (--expected == arrived && arrived != 0) open();
  }

 private:
  void open() { arrived = 0, ++generation; }
};

struct Warp {
  unsigned live = 0;  // lanes that exist and have not exited
  // The barrier expects the live lanes of the mask.  Lanes that have arrived agree on what and
  // mask.
  Barrier barrier;
  const char* what = nullptr;
  unsigned mask = 0;

  // The values that lanes exchange at the barrier of this generation, and which lanes arrived.  Two
  // alternate, as above.
  struct Exchange {
    unsigned lanes = 0;
    uint64_t value[kWarpSize];
  };
  Exchange exchange[2];

  void expect(const char* at, unsigned lanes) {
    what = at;
    mask = lanes;
    barrier.expected = unsigned(__builtin_popcount(mask & live));
  }
  void leave(unsigned lane) {
    live &= ~(1u << lane);
    if (barrier.arrived != 0 && mask >> lane & 1) barrier.leave();
  }
};

struct Block {
  unsigned index = 0;  // blockIdx.x
  unsigned rank = 0;   // in its cluster
  Barrier barrier;     // expects the threads that live
  uint64_t exits = 0;  // for TSan: what threads did before they exited
  SharedMemory memory;
  std::array<Warp, kMaxThreads / kWarpSize> warps;

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
  }
};

// A CUDA thread.  After this block its fiber runs a thread of the next block.
struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  unsigned index = 0;  // threadIdx.x
  bool done = true;

  // If it waits, then until `barrier` is past this generation.
  const Barrier* barrier = nullptr;
  unsigned generation = 0;
  const char* where = "";

  explicit Thread(void (*entry)()) : fiber(entry) {}

  void start(Block* b, unsigned i) {
    block = b;
    index = i;
    done = false;
  }
  bool ready() const { return !done && (!barrier || barrier->generation != generation); }
  unsigned lane() const { return index % kWarpSize; }
  Warp& warp() const { return block->warps[index / kWarpSize]; }
};

}  // namespace cuda_on_cpu
