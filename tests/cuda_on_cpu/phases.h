// The phases of a barrier in shared memory that counts arrivals and bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>

namespace cuda_on_cpu {

struct Thread;

constexpr int64_t kMaxPendingBytes = (1 << 20) - 1;  // of a phase

struct Phases {
  size_t offset = 0;  // of the barrier in the block's memory
  unsigned arrivals = 0;
  unsigned phase = 0;  // how many are complete

  // The last phase into which bytes have come, and that for which a thread has waited; 1: the
  // first.
  unsigned filled = 0, awaited = 0;

  // Of the current phase.  Bytes may come before they are expected: then there are less than 0.
  unsigned pending_arrivals = 0;
  int64_t pending_bytes = 0;

  // Who initialised it, whether barrier_init_fence() followed, and the number of the barrier of
  // the cluster after which other blocks see that.
  const Thread* initialiser = nullptr;
  bool fenced = false;
  unsigned seen_after = 0;

  // For TSan: the initial write, and what came before the end of a phase.  Phases alternate.
  uint64_t initialised = 0, order[2] = {};

  void start(size_t at, unsigned count, const Thread* by) {
    offset = at;
    arrivals = pending_arrivals = count;
    phase = filled = awaited = 0;
    pending_bytes = 0;
    initialiser = by;
    fenced = false;
  }
  uint64_t* current_order() { return &order[phase % 2]; }

  // Begin the next phase if this one is complete; return whether it was.
  bool advance() {
    if (pending_arrivals != 0 || pending_bytes != 0) return false;
    pending_arrivals = arrivals;
    ++phase;
    return true;
  }
};

// The barriers of a block.  The memory of one holds its number here and a mark, so that a barrier
// that was not initialised, or that was overwritten, is noticed.
class BarrierTable {
 public:
  void clear() { size_ = 0; }

  uint64_t add(size_t offset, unsigned arrivals, const Thread* by) {
    if (size_ == barriers_.size()) barriers_.emplace_back();
    barriers_[size_].start(offset, arrivals, by);
    return kMark << 32 | size_++;
  }
  // Return the barrier that lies at the offset, where the state is; null: there is none.
  Phases* find(size_t offset, uint64_t state) {
    const size_t number = state & 0xffffffff;
    if (state >> 32 != kMark || number >= size_) return nullptr;
    return barriers_[number].offset == offset ? &barriers_[number] : nullptr;
  }
  Phases* find(size_t offset) {
    for (size_t i = 0; i < size_; ++i) {
      if (barriers_[i].offset == offset) return &barriers_[i];
    }
    return nullptr;
  }
  // Apply f to each that is in use.
  template <class F>
  void each(F f) {
    for (size_t i = 0; i < size_; ++i) f(barriers_[i]);
  }

 private:
  static constexpr uint64_t kMark = 0xba221e25;
  std::deque<Phases> barriers_;  // TSan knows the places of these, so they stay
  size_t size_ = 0;
};

}  // namespace cuda_on_cpu
