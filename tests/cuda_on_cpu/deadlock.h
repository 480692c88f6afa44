// Reports a deadlock: which threads wait where, and for what.
#pragma once

#include <map>
#include <string>

#include "device.h"

namespace cuda_on_cpu {

// "0-31, 40, 64-95"
inline std::string ranges(const std::vector<unsigned>& sorted) {
  constexpr int kMost = 8;
  std::string text;
  int count = 0;
  for (size_t i = 0, end; i < sorted.size(); i = end) {
    for (end = i + 1; end < sorted.size() && sorted[end] == sorted[end - 1] + 1;) ++end;
    if (count++ == kMost) return text + ", ...";
    text += (i ? ", " : "") + std::to_string(sorted[i]);
    if (end > i + 1) text += "-" + std::to_string(sorted[end - 1]);
  }
  return text;
}

// Print what the barriers lack at which threads of the block wait.
inline void report_barriers(unsigned b) {
  Block& block = *device.blocks[b];
  block.arrival_barriers.each([&](const Phases& barrier) {
    bool awaited = false;
    for (unsigned i = 0; i < device.threads_per_block; ++i) {
      const Thread& thread = *device.threads[b * device.threads_per_block + i];
      awaited |= !thread.done && thread.counter == &barrier.phase;
    }
    if (!awaited) return;
    std::fprintf(stderr, "  block %u: phase %u of a barrier lacks %u arrivals and %lld bytes\n",
                 block.index, barrier.phase, barrier.pending_arrivals,
                 static_cast<long long>(barrier.pending_bytes));
  });
}

[[noreturn]] inline void report_deadlock() {
  std::fprintf(stderr, "cuda_on_cpu: deadlock\n");
  const unsigned size = device.threads_per_block;
  for (unsigned b = 0; b < device.cluster_size; ++b) {
    std::map<std::string, std::vector<unsigned>> threads;
    for (unsigned i = 0; i < size; ++i) {
      const Thread& thread = *device.threads[b * size + i];
      threads[thread.done ? "have exited" : std::string("wait at ") + thread.where].push_back(i);
    }
    for (const auto& [state, which] : threads) {
      std::fprintf(stderr, "  block %u: %zu threads %s: %s\n", device.blocks[b]->index,
                   which.size(), state.c_str(), ranges(which).c_str());
    }
    report_barriers(b);
  }
  std::abort();
}

}  // namespace cuda_on_cpu
