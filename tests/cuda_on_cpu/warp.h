// Barriers, and groups of lanes of a warp that exchange values at one.
#pragma once

#include <cstdint>
#include <deque>

namespace cuda_on_cpu {

constexpr unsigned kWarpSize = 32;

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

// The lanes of a mask.  They agree on what they wait at.
struct LaneGroup {
  unsigned mask = 0;
  const char* what = nullptr;
  Barrier barrier;      // expects those that live
  unsigned inside = 0;  // lanes that have arrived and not left

  // The values that lanes exchange at the barrier of this generation, and which lanes arrived.  Two
  // alternate, as above.
  struct Exchange {
    unsigned lanes = 0;
    uint64_t value[kWarpSize];
  };
  Exchange exchange[2];

  Exchange& latest() { return exchange[barrier.generation % 2]; }
  const Exchange& latest() const { return exchange[barrier.generation % 2]; }
};

// Lanes may wait in several groups at the same time, also those of a mask for those of another.
struct Warp {
  unsigned live = 0;     // lanes that exist and have not exited
  unsigned waiting = 0;  // groups in which lanes wait
  std::deque<LaneGroup> groups;

  // Return the group of the mask.  TSan would order the lanes of two masks that share a group in
  // turn, so that happens only if there are very many.
  LaneGroup& group(unsigned mask) {
    LaneGroup* unused = nullptr;
    for (LaneGroup& g : groups) {
      if (g.mask == mask) return g;
      if (g.inside == 0) unused = &g;
    }
    if (!unused || groups.size() < kWarpSize) unused = &groups.emplace_back();
    unused->mask = mask;
    return *unused;
  }
  // Return a group that waits for the lane while the lane is about to wait for one of it: both
  // would wait forever.  Null: there is none.
  const LaneGroup* waiting_for_each_other(unsigned lane, unsigned mask) const {
    for (const LaneGroup& g : groups) {
      const bool waits = g.barrier.arrived != 0 && g.mask != mask;
      if (waits && g.mask >> lane & 1 && g.latest().lanes & mask) return &g;
    }
    return nullptr;
  }
  void leave(unsigned lane) {
    live &= ~(1u << lane);
    if (waiting == 0) return;
    for (LaneGroup& g : groups) {
      if (g.barrier.arrived == 0 || !(g.mask >> lane & 1)) continue;
      g.barrier.leave();
      if (g.barrier.arrived == 0) --waiting;
    }
  }
};

}  // namespace cuda_on_cpu
