// Decides which thread runs when.
#pragma once

#include <algorithm>
#include <string>

#include "copies.h"
#include "deadlock.h"
#include "random.h"

namespace cuda_on_cpu {

// A schedule, chosen by FASTDIV_SHIM_ORDER:
//   forward   (default) each warp in turn runs until all its lanes wait for other warps
//   reverse   the same from the last lane of the last block to the first
//   lockstep  each thread in turn runs to its next wait: all warps advance together
//   <seed>    warps and lanes in random order, each warp for a random number of steps
// The first two let warps run ahead of each other as far as possible, the third not at all.  A
// kernel must give the same result with all of them.
class Scheduler {
 public:
  Scheduler() {
    const char* const chosen = std::getenv("FASTDIV_SHIM_ORDER");
    const std::string order = chosen && *chosen ? chosen : "forward";
    reverse_ = order == "reverse";
    lockstep_ = order == "lockstep";
    random_ = order.find_first_not_of("0123456789") == std::string::npos;
    if (random_) random_state_ = std::strtoull(chosen, nullptr, 10);
    if (!reverse_ && !lockstep_ && !random_ && order != "forward") {
      std::fprintf(stderr, "cuda_on_cpu: FASTDIV_SHIM_ORDER is '%s', %s\n", chosen,
                   "not forward, reverse, lockstep or a number");
      std::abort();
    }
    const unsigned size = device.threads_per_block;
    for (unsigned block = 0; block < device.cluster_size; ++block) {
      for (unsigned first = 0; first < size; first += kWarpSize) {
        warps_.push_back({block * size + first, std::min(kWarpSize, size - first)});
      }
    }
    for (unsigned lane = 0; lane < kWarpSize; ++lane) lanes_.push_back(lane);
    if (reverse_) {
      std::reverse(warps_.begin(), warps_.end());
      std::reverse(lanes_.begin(), lanes_.end());
    }
  }

  bool reverse() const { return reverse_; }

  // Run every thread of the cluster to its end.
  void run_cluster() {
    while (device.cluster_barrier.expected != 0) {
      // A random pass may skip all that could run.
      if (!pass(random_) && !(random_ && pass(false)) && !land_until_a_phase_ends()) {
        report_deadlock();
      }
    }
  }

 private:
  struct WarpOfThreads {
    unsigned first, lanes;
  };

  // Go once through the warps; return false if nothing happened.
  bool pass(bool at_random) {
    if (at_random) {
      std::shuffle(warps_.begin(), warps_.end(), Random{random_state_});
      std::shuffle(lanes_.begin(), lanes_.end(), Random{random_state_});
    }
    bool progress = false;
    for (const WarpOfThreads& warp : warps_) {
      if (device.landing.random && land_some()) progress = true;
      while (!(at_random && Random{random_state_}() % 2) && step(warp)) {
        progress = true;
        if (lockstep_) break;
      }
    }
    return progress;
  }

  // Let each lane that can run do so until it waits; return false if none could.
  bool step(const WarpOfThreads& warp) {
    bool progress = false;
    for (const unsigned lane : lanes_) {
      if (lane >= warp.lanes) continue;
      Thread& thread = *device.threads[warp.first + lane];
      if (!thread.ready()) continue;
      resume(thread);
      progress = true;
    }
    return progress;
  }

  static void resume(Thread& thread) {
    device.current = &thread;
    threadIdx.x = thread.index;
    blockIdx.x = thread.block->index;
    device.scheduler.switch_to(thread.fiber);
  }

  bool reverse_, lockstep_, random_;
  uint64_t random_state_ = 0;
  std::vector<WarpOfThreads> warps_;
  std::vector<unsigned> lanes_;
};

}  // namespace cuda_on_cpu
