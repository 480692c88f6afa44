// A team's slice of a row, on its way through shared memory.
//
// The slice comes in stages.  Every stage has a slot of packs, as they lie in global memory: if the
// row is off alignment, a column's pack is joined from two.  A stage begins at a column, not at an
// address, so a column belongs to the same thread wherever the row lies.  Packs that the row does
// not fill are written by threads; columns outside of the row have no mass, so they add nothing.
#pragma once

#include "cuda/pack.cuh"
#include "cuda/team.cuh"

namespace fastdiv {

// One row of the slice: that of the logits or of the target.
template <class T>
struct StagedRow {
  static constexpr int kSize = Pack<T>::kSize;
  const T* row;    // in global memory
  Pack<T>* slots;  // in shared memory
  int shift;       // how many elements a stage begins after a pack
  T outside;       // what columns outside of the row hold

  // Load a thread's packs from a slot, `step` packs apart.
  template <int kPacks>
  __device__ __forceinline__ void load(const Pack<T>* from, int step,
                                       Pack<T> (&packs)[kPacks]) const {
    if (shift == 0) {
      FD_UNROLL
      for (int u = 0; u < kPacks; ++u) packs[u] = Pack<T>::read(from + u * step);
    } else {
      FD_UNROLL
      for (int u = 0; u < kPacks; ++u)
        packs[u] = join(Pack<T>::read(from + u * step), Pack<T>::read(from + u * step + 1),
                        unsigned(shift * sizeof(T)));
    }
  }

  // The packs of columns [first, last): pack g begins at column first - shift + g * kSize.
  struct Packs {
    int first;             // column
    int whole, end_whole;  // which packs lie inside of the row
  };
  __device__ __forceinline__ Packs packs(int first, int last, int classes) const {
    const int begin = first - shift, count = (last - begin + kSize - 1) / kSize;
    const int inside = (classes - begin) / kSize;
    return {begin, begin < 0 ? 1 : 0, inside < count ? inside : count};
  }

  // Write what whole packs leave out of columns [first, end): the row's first and last elements,
  // and columns outside of it.
  __device__ __forceinline__ void write_edges(Pack<T>* slot, const Packs& p, int end, int classes,
                                              const Threads& threads) const {
    T* const elements = reinterpret_cast<T*>(slot);
    if (p.whole == 1 && threads.index < kSize - shift)
      elements[shift + threads.index] = threads.index < classes ? row[threads.index] : outside;
    const int first = p.end_whole > p.whole ? p.end_whole : p.whole;
    for (int e = first * kSize + threads.index; e < end - p.first; e += threads.count)
      elements[e] = p.first + e < classes ? row[p.first + e] : outside;
  }
};

template <class T, int kStreams>
class Slice {
 public:
  using Row = StagedRow<T>;
  static constexpr int kSize = Row::kSize;
  static constexpr int kBlockStage = int(cuda::kBytesPerStage / int64_t(sizeof(T)));  // columns

  const int begin, end;  // columns
  Row rows[kStreams];

  // `columns`: how many a thread takes at a time.
  __device__ __forceinline__ Slice(Team& team, const cuda::ForwardShape& shape, int classes,
                                   int begin, int end, int columns, const Row (&of)[kStreams],
                                   unsigned char* shared)
      : begin(begin),
        end(end),
        team_(team),
        shape_(shape),
        classes_(classes),
        tile_(team.count * columns),
        stage_(pin_in_register(team.whole_block() ? kBlockStage : shape.slice)),
        bulk_(has_bulk_copies() && team.whole_block()),
        meets_(!bulk_ || !shape.stays()) {
    FD_SHARED(ArrivalBarrier, arrived, cuda::kMaxSlots);
    arrived_ = pin_shared(arrived);
    Pack<T>* slots = reinterpret_cast<Pack<T>*>(shared);
    slots += team.group() * (kStreams * packs());  // each team of the block has slots of its own
    FD_UNROLL
    for (int k = 0; k < kStreams; ++k) {
      rows[k] = of[k];
      rows[k].slots = pin_shared(slots + k * shape.slots * packs());
      const uintptr_t address = reinterpret_cast<uintptr_t>(of[k].row + begin);
      rows[k].shift = pin_in_register(int(address % 16 / sizeof(T)));
    }
    init_barriers();
  }

  // Whether the whole slice is in shared memory after the first pass.
  __device__ __forceinline__ bool stays() const { return shape_.stays(); }
  __device__ __forceinline__ int stage() const { return stage_; }  // columns

  // Begin a pass.  Return the column at which it begins: as many stages before the slice as are
  // asked for before the first is used.  Between two passes a team merges what the first one found,
  // so all threads have read its slots.
  __device__ __forceinline__ int begin_pass() {
    if (stays()) slot_ = free_ = 0, parity_ = 0;
    return asks() ? begin - ahead() : begin;
  }
  __device__ __forceinline__ void end_pass() { again_ = true; }

  // Ask for a later stage, and wait for the one that begins at this column.  Return false before
  // the first.
  __device__ __forceinline__ bool await(int first) {
    const int later = first + ahead();
    if (asks() && (first <= begin || later < end || meets_)) {
      if (meets_ && first >= begin) meet(first);
      ask(later);
      if (first < begin) return false;
      if (bulk_ && first == begin) team_.sync();  // for the barriers and the edges
    }
    if (bulk_) barrier_wait(&arrived_[slot_], parity_);
    return true;
  }
  // Go to the slot of the next stage; return whether it is the first slot.
  __device__ __forceinline__ bool next_slot() {
    if (!next(slot_)) return false;
    parity_ ^= 1;
    return true;
  }

  // Return where stream k begins in the slot.
  __device__ __forceinline__ const Pack<T>* slot(int k) const {
    return rows[k].slots + slot_ * packs();
  }

  // Return the pack of stream k at column i, a pack's first in memory, of a slice that stays.
  __device__ __forceinline__ Pack<T> pack_in_memory(int k, int i) const {
    const int place = (i - begin + rows[k].shift) / kSize;
    // A slot has one pack more than a stage.  So the pack after the last stage is in its slot, too.
    // A team of lanes has one slot.
    const int s = place / (kBlockStage / kSize);
    const int last = team_.whole_block() ? (end - begin - 1) / kBlockStage : 0;
    return Pack<T>::read(rows[k].slots + place + (s < last ? s : last));
  }

 private:
  __device__ __forceinline__ int packs() const { return stage() / kSize + 1; }  // of a slot

  __device__ __forceinline__ void init_barriers() const {
    const bool cluster = team_.blocks > 1;
    if ((bulk_ || cluster) && threadIdx.x == 0) {
      FD_UNROLL
      for (int s = 0; s < cuda::kMaxSlots; ++s) barrier_init(&arrived_[s], 1);
      team_.init_barriers();
      barrier_init_fence();
    }
    if (cluster) cluster_arrive();
  }

  // Whether the present pass copies the slice.
  __device__ __forceinline__ bool asks() const { return !again_ || !stays(); }
  // Return how many columns a stage is asked for before it is used.
  __device__ __forceinline__ int ahead() const {
    return (shape_.slots > 1 ? shape_.slots - 1 : 1) * stage_;
  }
  __device__ __forceinline__ bool next(int& slot) const {
    if (++slot != shape_.slots) return false;
    slot = 0;
    return true;
  }

  // Let all threads come to this stage.  They have read the one before, whose slot is used again,
  // and see what the others have copied.
  __device__ __forceinline__ void meet(int first) const {
    if (bulk_ && first == begin) return;
    if (!bulk_ && team_.whole_block())
      copies_wait<cuda::kSlots - 2>();
    else if (!bulk_)
      copies_wait<0>();
    team_.sync();
  }

  // Ask for the stage that begins at this column, if there is one.
  __device__ __forceinline__ void ask(int first) {
    if (first < end) {
      if (bulk_ && threadIdx.x == 0) fence_before_copy();
      copy(first, free_);
      next(free_);
    }
    if (!bulk_) copies_commit();
  }

  // Ask for a stage.  All threads of the team call it.
  __device__ __forceinline__ void copy(int first, int slot) const {
    const int last = first + stage() < end ? first + stage() : end;
    if (!bulk_) {
      FD_UNROLL
      for (int k = 0; k < kStreams; ++k) {
        const auto p = rows[k].packs(first, last, classes_);
        Pack<T>* const to = rows[k].slots + slot * packs();
        for (int g = p.whole + team_.index; g < p.end_whole; g += team_.count)
          copy_16(to + g, rows[k].row + p.first + g * kSize);
      }
    } else if (threadIdx.x == 0) {
      copy_bulk_stage(first, last, slot);
    }
    // Few stages have packs that the row does not fill: the first and those at the row's end.
    if (first > 0 && last + kSize <= classes_) return;
    const int filled = first + ((last - first + tile_ - 1) & -tile_);
    FD_UNROLL
    for (int k = 0; k < kStreams; ++k)
      rows[k].write_edges(rows[k].slots + slot * packs(), rows[k].packs(first, last, classes_),
                          filled, classes_, team_);
  }

  __device__ __forceinline__ void copy_bulk_stage(int first, int last, int slot) const {
    typename Row::Packs packs_of[kStreams];
    unsigned bytes[kStreams], all = 0;
    FD_UNROLL
    for (int k = 0; k < kStreams; ++k) {
      packs_of[k] = rows[k].packs(first, last, classes_);
      const int whole = packs_of[k].end_whole - packs_of[k].whole;
      all += bytes[k] = whole > 0 ? unsigned(whole) * 16 : 0;
    }
    barrier_expect(&arrived_[slot], all);
    FD_UNROLL
    for (int k = 0; k < kStreams; ++k) {
      if (bytes[k] == 0) continue;
      const int g = packs_of[k].whole;
      copy_bulk(rows[k].slots + slot * packs() + g, rows[k].row + packs_of[k].first + g * kSize,
                bytes[k], &arrived_[slot]);
    }
  }

  Team& team_;
  const cuda::ForwardShape& shape_;
  const int classes_, tile_, stage_;
  const bool bulk_, meets_;  // whether one thread copies; whether all meet at every stage
  bool again_ = false;       // whether the slice has been read
  ArrivalBarrier* arrived_;  // one for each slot
  int slot_ = 0, free_ = 0;  // those of the present stage and of the next that is asked for
  unsigned parity_ = 0;      // of the phase in which the present slot fills
};

}  // namespace fastdiv
