// The threads that share a row, and how their results are merged.
#pragma once

#include "cuda/async.cuh"
#include "cuda/launch_shapes.h"
#include "losses/divergence.h"

namespace fastdiv {

constexpr unsigned kAllLanes = ~0u;

// Lanes of a warp that act together: 2^n of them, side by side.
// kWholeWarp: all lanes of the warp do the same, in groups of `count`.
template <bool kWholeWarp>
struct Lanes {
  int count;
  unsigned mask = kAllLanes;  // the lanes of the group, unless the whole warp takes part

  // Combine v[k] of all.  Every lane gets the same bits.
  template <int n, class real, class Op>
  __device__ __forceinline__ void reduce(real* v, Op op) const {
    if constexpr (kWholeWarp) {
      FD_UNROLL
      for (int m = kWarp / 2; m > 0; m /= 2)
        if (m < count) step<n>(v, kAllLanes, m, op);
    } else {
#pragma unroll 1
      for (int m = count / 2; m > 0; m /= 2) step<n>(v, mask, m, op);
    }
  }
  template <int n, class real>
  __device__ __forceinline__ void sum(real* v) const {
    reduce<n>(v, [](real a, real b) { return sum_of_two(a, b); });
  }
  template <int n, class real>
  __device__ __forceinline__ void max(real* v) const {
    reduce<n>(v, [](real a, real b) { return larger_of(a, b); });
  }

 private:
  template <int n, class real, class Op>
  static __device__ __forceinline__ void step(real* v, unsigned mask, int m, Op op) {
    FD_UNROLL
    for (int k = 0; k < n; ++k) v[k] = op(v[k], __shfl_xor_sync(mask, v[k], m));
  }
};

// --- what teams merge: one value of each thread ------------------------------------------------

// The state of a row's first pass: what the loss uses of it, first the maxima, then what adds up.
// The last number is the label's logit, which one thread has and the others hold as 0.
template <class P>
struct FirstPass {
  using real = typename P::real;
  static constexpr bool kTarget = P::kTarget != Target::kNone;
  static constexpr bool kNormalise = P::kTarget == Target::kLogits;
  static constexpr int kMaxima = 1 + kNormalise + P::kTilted;
  static constexpr int kSums = P::kSums < 3 ? P::kSums : 4;
  static constexpr int kAdded = 1 + kTarget + P::kTilted + kSums + P::kReadsLabel;
  real numbers[kMaxima + kAdded];

  __device__ __forceinline__ FirstPass(RowState<P> s, real x_label) {
    int i = 0;
    each(s, [&](real& v) { numbers[i++] = v; });
    if constexpr (P::kReadsLabel) numbers[i] = x_label;
  }
  __device__ __forceinline__ RowState<P> state() const {
    RowState<P> s;
    int i = 0;
    each(s, [&](real& v) { v = numbers[i++]; });
    return s;
  }
  __device__ __forceinline__ real x_label() const {
    return P::kReadsLabel ? numbers[kMaxima + kAdded - 1] : real(0);
  }

 private:
  template <class Body>
  static __device__ __forceinline__ void each(RowState<P>& s, Body body) {
    body(s.x.max);
    if constexpr (kNormalise) body(s.t.max);
    if constexpr (P::kTilted) body(s.tilted.max);
    body(s.x.sum);
    if constexpr (kTarget) body(s.t.sum);
    if constexpr (P::kTilted) body(s.tilted.sum);
    if constexpr (kSums > 0) body(s.sums.a);
    if constexpr (kSums > 1) body(s.sums.b);
    if constexpr (kSums > 2) body(s.sums.c), body(s.sums.d);
  }
};

template <class P>
struct MergeFirstPass {
  using real = typename P::real;
  const P& loss;
  real scale;

  template <class Lanes>
  __device__ __forceinline__ void operator()(FirstPass<P>& v, const Lanes& lanes) const {
    RowState<P> s = v.state();
    real max[] = {s.x.max, s.t.max};
    lanes.template max<s.kNormalise ? 2 : 1>(max);
    s.rebase(loss, max[0], max[1], scale);
    if constexpr (P::kTilted) {
      real max_tilted[] = {s.tilted.max};
      lanes.template max<1>(max_tilted);
      s.tilted.rebase(max_tilted[0], real(1));
    }
    v = FirstPass<P>(s, v.x_label());
    lanes.template sum<FirstPass<P>::kAdded>(v.numbers + FirstPass<P>::kMaxima);
  }
};

template <class real>
struct MergeTerms {
  template <class Lanes>
  __device__ __forceinline__ void operator()(TermSums<real>& s, const Lanes& lanes) const {
    real sum[] = {s.f, s.u, s.v, s.q, s.p};
    lanes.template sum<5>(sum);
    s = {sum[0], sum[1], sum[2], sum[3], sum[4]};
  }
};

// The first column that holds the maximum or NaN.
template <class real>
struct ArgMax {
  real max = -Limits<real>::infinity;
  int column = 0;

  __device__ __forceinline__ void push(real v, int i) {
    const bool larger = v > max || (v != v && max == max);
    const bool level = v == max || (v != v && max != max);
    if (larger || (level && i < column)) max = v, column = i;
  }
};
template <class real>
struct MergeArgMax {
  template <class Lanes>
  __device__ __forceinline__ void operator()(ArgMax<real>& s, const Lanes& lanes) const {
    for (int m = lanes.count / 2; m > 0; m /= 2) {
      const real max = __shfl_xor_sync(lanes.mask, s.max, m);
      s.push(max, __shfl_xor_sync(lanes.mask, s.column, m));
    }
  }
};

// --- teams --------------------------------------------------------------------------------------

// The threads of one block that share a row or a piece of it: 8, 16 or 32 lanes, or all.
struct Threads {
  int count, index;  // how many, and which of them this is
  unsigned mask;     // the lanes of this warp that are among them

  __device__ __forceinline__ explicit Threads(int n)
      : count(n), index(int(threadIdx.x) & (n - 1)), mask(kAllLanes) {
    const int lane = int(threadIdx.x) & (kWarp - 1);
    if (n < kWarp) mask = ((1u << n) - 1) << (lane - index);
  }
  __device__ __forceinline__ bool whole_block() const { return count > kWarp; }
  // Return which row or piece of the block they have.
  __device__ __forceinline__ int group() const {
    return whole_block() ? 0 : int(threadIdx.x) >> log2_of(count);
  }
  __device__ __forceinline__ void sync() const {
    if (whole_block())
      __syncthreads();
    else
      __syncwarp(mask);
  }
};

// The threads that share a row in a forward: of one block, or of a cluster of 2^n blocks.
struct Team : Threads {
  static constexpr int kWarps = cuda::kForwardThreads / kWarp;  // of a block
  static_assert(kWarps * cuda::kMaxCluster <= kWarp, "a lane takes the result of a warp");

  const int blocks, block;    // of the cluster, and which of them this is
  ArrivalBarrier* exchanged;  // two, of a cluster
  int exchanges = 0;          // how many there were
  bool met = false;           // whether all blocks of the cluster are known to have begun

  __device__ __forceinline__ Team(int threads, int blocks)
      : Threads(threads), blocks(blocks), block(int(blockIdx.x) & (blocks - 1)) {
    FD_SHARED(ArrivalBarrier, barriers, 2);
    exchanged = barriers;
  }
  // Return which row of the launch it has.
  __device__ __forceinline__ int64_t row() const {
    if (whole_block()) return int64_t(blockIdx.x >> log2_of(blocks));
    return int64_t(blockIdx.x) * (cuda::kForwardThreads >> log2_of(count)) + group();
  }
  __device__ __forceinline__ bool leads() const { return index == 0 && block == 0; }

  // Prepare exchanges; one thread of a block calls it before barrier_init_fence().
  __device__ __forceinline__ void init_barriers() const {
    barrier_init(&exchanged[0], 1);
    barrier_init(&exchanged[1], 1);
  }

  // Merge the values of all threads.  Every thread gets the same bits.  Two arrays alternate: a
  // thread that writes to one has seen all others write to the other, so they have read this one.
  template <class V, class Merge>
  __device__ __forceinline__ V all(V v, const Merge& merge) {
    merge_into<true>(v, merge);
    return v;
  }
  // Merge them for the thread that leads; the others may leave.  Return whether this is its warp.
  template <class V, class Merge>
  __device__ __forceinline__ bool leader(V& v, const Merge& merge) {
    return merge_into<false>(v, merge);
  }

  // End.  What peers send has arrived: every exchange waits for all of it, and who leaves one early
  // is sent nothing.
  __device__ __forceinline__ void leave() {
    if (blocks > 1 && !met) cluster_wait();
  }

 private:
  template <bool kAll, class V, class Merge>
  __device__ __forceinline__ bool merge_into(V& v, const Merge& merge) {
    constexpr int kWords = int(sizeof(V) + 7) / 8 * 2;
    FD_SHARED(uint32_t, words_of_warp, 2 * kWarp * kWords);
    uint32_t* const of_warp = words_of_warp + (exchanges & 1) * (kWarp * kWords);
    if (!whole_block()) {
      merge(v, Lanes<false>{count, mask});
      return true;
    }
    merge(v, Lanes<true>{kWarp});
    const int lane = index & (kWarp - 1), warp = block * kWarps + index / kWarp;
    const int warps = blocks * kWarps;
    uint32_t words[kWords] = {};
    memcpy(words, &v, sizeof(V));
    if (blocks > 1) {
      const bool first = block == 0 && index < kWarp;
      push<kAll>(of_warp + warp * kWords, words, lane, warps);
      if (!kAll && !first) return false;
      barrier_wait(&exchanged[exchanges & 1], unsigned(exchanges >> 1 & 1));
    } else {
      if (lane == 0) {
        FD_UNROLL
        for (int i = 0; i < kWords; ++i) of_warp[warp * kWords + i] = words[i];
      }
      __syncthreads();
      if (!kAll && index >= kWarp) return false;
    }
    const uint32_t* const from = of_warp + (lane & (warps - 1)) * kWords;
    FD_UNROLL
    for (int i = 0; i < kWords; ++i) words[i] = from[i];
    memcpy(&v, words, sizeof(V));
    merge(v, Lanes<true>{warps});
    ++exchanges;
    return true;
  }

  // Send this warp's words to all blocks of the cluster, or to the first.
  template <bool kAll, int kWords>
  __device__ __forceinline__ void push(uint32_t* to, const uint32_t (&words)[kWords], int lane,
                                       int warps) {
    if (!met) cluster_wait();
    met = true;
    __syncwarp();  // what the other lanes have read comes before what peers may write now
    ArrivalBarrier* const arrived = &exchanged[exchanges & 1];
    if (index == 0 && (kAll || block == 0))
      barrier_expect(arrived, unsigned(warps * kWords * sizeof(uint32_t)));
    if (lane < (kAll ? blocks : 1)) {
      FD_UNROLL
      for (int i = 0; i < kWords; i += 2)
        send<2>(to + i, unsigned(lane), {words[i], words[i + 1]}, arrived);
    }
  }
};

}  // namespace fastdiv
