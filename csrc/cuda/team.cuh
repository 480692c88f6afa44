// The threads that share a row, and how their results are merged.
#pragma once

#include "cuda/device.cuh"
#include "cuda/launch_shapes.h"
#include "losses/divergence.h"

namespace fastdiv {

constexpr unsigned kAllLanes = 0xffffffffu;

// Combine v[k] of every `width` lanes.  All lanes get the same bits.
template <int n, class real, class Op>
__device__ __forceinline__ void reduce_lanes(real* v, int width, Op op) {
#pragma unroll 1
  for (int m = width / 2; m > 0; m /= 2) {
    FD_UNROLL
    for (int k = 0; k < n; ++k) v[k] = op(v[k], __shfl_xor_sync(kAllLanes, v[k], m));
  }
}
template <int n, class real>
__device__ __forceinline__ void sum_lanes(real* v, int width) {
  reduce_lanes<n>(v, width, [](real a, real b) { return sum_of_two(a, b); });
}

template <class P>
struct MergeStates {
  using real = typename P::real;
  const P& loss;
  real scale;

  __device__ __forceinline__ void operator()(RowState<P>& s, int width) const {
    constexpr int kRows = s.kNormalise ? 2 : 1;
    real max[] = {s.x.max, s.t.max};
    reduce_lanes<kRows>(max, width, [](real a, real b) { return larger_of(a, b); });
    s.rebase(loss, max[0], max[1], scale);
    real sum[] = {s.x.sum, s.t.sum, s.sums.a, s.sums.b, s.sums.c, s.sums.d};
    sum_lanes<2 + P::kSums>(sum, width);
    s.x.sum = sum[0], s.t.sum = sum[1];
    s.sums = {sum[2], sum[3], sum[4], sum[5]};
    if constexpr (P::kTilted) {
      real max_tilted[] = {s.tilted.max};
      reduce_lanes<1>(max_tilted, width, [](real a, real b) { return larger_of(a, b); });
      s.tilted.rebase(max_tilted[0], real(1));
      sum_lanes<1>(&s.tilted.sum, width);
    }
  }
};
template <class real>
struct MergeTerms {
  __device__ __forceinline__ void operator()(TermSums<real>& s, int width) const {
    real sum[] = {s.f, s.u, s.v, s.q, s.p};
    sum_lanes<5>(sum, width);
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
  __device__ __forceinline__ void operator()(ArgMax<real>& s, int width) const {
    for (int m = width / 2; m > 0; m /= 2) {
      const real max = __shfl_xor_sync(kAllLanes, s.max, m);
      s.push(max, __shfl_xor_sync(kAllLanes, s.column, m));
    }
  }
};

// Wait for the threads of a row, before one overwrites what another reads or writes.
__device__ __forceinline__ void sync_threads(int threads) {
  if (threads == kWarp)
    __syncwarp();
  else
    __syncthreads();
}

// A warp, a block of 2^n warps, or a cluster of 2^n such blocks.
struct Team {
  int threads, blocks;  // per block, per cluster
  int thread, block;    // the index of this one
  int slot = 0;         // alternates, so that one barrier per exchange is enough

  __device__ __forceinline__ bool leads() const { return thread == 0 && block == 0; }

  // Merge the values of all threads of the team.  Every thread gets the same bits.
  template <class V, class Merge>
  __device__ __forceinline__ V all(V v, Merge merge) {
    FD_SHARED(V, of_warp, 2 * kMaxWarps);
    FD_SHARED(V, of_block, 2);
    const int lane = thread % kWarp, warps = threads / kWarp;
    // One loop for lanes, then warps, then blocks, because the merge is much code.
    for (int width = kWarp, level = 0;; ++level) {
      merge(v, width);
      if (level == (blocks > 1 ? 2 : warps > 1 ? 1 : 0)) break;
      if (level == 0) {
        if (lane == 0) of_warp[slot * kMaxWarps + thread / kWarp] = v;
        __syncthreads();
        v = of_warp[slot * kMaxWarps + lane % warps];
        width = warps;
      } else {
        if (thread == 0) of_block[slot] = v;
        cluster_sync();
        v = *cluster_peer(&of_block[slot], unsigned(lane % blocks));
        width = blocks;
      }
    }
    slot ^= 1;
    return v;
  }

  // Wait until no other block reads this block's shared memory.
  __device__ __forceinline__ void leave() const {
    if (blocks > 1) cluster_leave();
  }
};

}  // namespace fastdiv
