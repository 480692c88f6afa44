// The threads that share a row, and how what each has seen becomes what all know.
#pragma once

#include "cuda/device.cuh"
#include "losses/divergence.h"

namespace fastdiv {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32, kMaxWarps = 32;

template <class real, class Op>
__device__ __forceinline__ real reduce_lanes(real v, int width, Op op) {
#pragma unroll 1
  for (int m = width / 2; m > 0; m /= 2) v = op(v, __shfl_xor_sync(kAllLanes, v, m));
  return v;
}
template <class real>
__device__ __forceinline__ real max_of_lanes(real v, int width) {
  return reduce_lanes(v, width, [](real a, real b) { return a > b ? a : b; });
}
template <class real>
__device__ __forceinline__ real sum_of_lanes(real v, int width) {
  return reduce_lanes(v, width, [](real a, real b) { return a + b; });
}

// Every `width` lanes to what they hold together, all of them to the same bits.
template <class P>
struct MergeStates {
  using real = typename P::real;
  const P& loss;
  real scale;

  __device__ __forceinline__ void operator()(RowState<P>& s, int width) const {
    s.rebase(loss, max_of_lanes(s.x.max, width),
             s.kNormalise ? max_of_lanes(s.t.max, width) : s.t.max, scale);
    s.x.sum = sum_of_lanes(s.x.sum, width);
    if constexpr (P::kTarget != Target::kNone) s.t.sum = sum_of_lanes(s.t.sum, width);
    for (real* sum : {&s.sums.a, &s.sums.b, &s.sums.c, &s.sums.d}) *sum = sum_of_lanes(*sum, width);
  }
};
template <class real>
struct MergeTerms {
  __device__ __forceinline__ void operator()(Terms<real>& s, int width) const {
    for (real* sum : {&s.f, &s.u, &s.v}) *sum = sum_of_lanes(*sum, width);
  }
};

// The first column that holds the maximum, or NaN.
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

// A warp, a block of 2^n warps, or a cluster of 2^n such blocks.
struct Team {
  int threads, blocks;  // of a block, of a cluster
  int thread, block;    // which of them this is
  int slot = 0;         // alternates, so that one barrier an exchange is enough

  __device__ __forceinline__ bool leads() const { return thread == 0 && block == 0; }

  // What all threads of the team hold together, and every one of them the same bits.
  template <class V, class Merge>
  __device__ __forceinline__ V all(V v, Merge merge) {
    FD_SHARED(V, of_warp, 2 * kMaxWarps);
    FD_SHARED(V, of_block, 2);
    const int lane = thread % kWarp, warps = threads / kWarp;
    // One loop, for the merge is much code: lanes, then warps, then blocks.
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

  // Before a thread overwrites what another one reads.
  __device__ __forceinline__ void sync() const {
    if (threads == kWarp)
      __syncwarp();
    else
      __syncthreads();
  }
  // No block leaves while another one may read its shared memory.
  __device__ __forceinline__ void leave() const {
    if (blocks > 1) cluster_sync();
  }
};

}  // namespace fastdiv
