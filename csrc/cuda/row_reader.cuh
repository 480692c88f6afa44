// Reads one block's slice of a row.  The first `cached` columns stay in shared memory after the
// first pass.
#pragma once

#include "cuda/pack.cuh"
#include "cuda/launch_shapes.h"
#include "cuda/team.cuh"
#include "losses/gradient.h"
#include "losses/row.h"

namespace fastdiv {

// How many columns a thread holds in registers at a time.
template <class P>
constexpr int kColumns = sizeof(typename P::real) == 8 ? 2 : 8;

// kCapped: logits are softcapped.  That takes so many registers that it has kernels of its own.
template <class P, class T, bool kCapped>
struct RowReader {
  using real = typename P::real;
  static constexpr Target kTarget = P::kTarget;
  static constexpr bool kTeacher = kTarget != Target::kNone;
  static constexpr int kSize = Pack<T>::kSize, kPacks = kColumns<P> / kSize;
  using Packs = Pack<T>[kPacks];

  const RowArgs& a;
  const P loss;
  const real scale;
  const Softcap<real> cap;
  Stretch<T> x, t;
  Stretch<T> cached_x, cached_t;

  __device__ __forceinline__ RowReader(const RowArgs& args, int64_t r, int begin, int end,
                                       unsigned char* cache, int cached)
      : a(args),
        loss(args.params),
        scale(pin_in_register(real(args.scale))),
        cap{real(args.softcap)} {
    x = {row_of(a.x, r), begin, end};
    t = {kTeacher ? row_of(a.t, r) : nullptr, begin, end};
    // The cache has the column indices of the row.
    T* const first = reinterpret_cast<T*>(cache);
    cached_x = {first - begin, begin, begin + cached};
    cached_t = {first + cached - begin, begin, begin + cached};
  }

  static __device__ __forceinline__ T* row_of(const Matrix& m, int64_t r) {
    return static_cast<T*>(m.data) + r * m.stride;
  }

  // The columns of a thread's packs, unpacked.  The packs begin at column i + u * step.  Columns
  // outside of the row have no mass on either side, so they add nothing.
  struct Tile {
    real x[kColumns<P>], t[kColumns<P>], weights[kColumns<P>];
  };
  __device__ __forceinline__ Tile unpack(const Packs& px, const Packs& pt, int i, int step) const {
    Tile tile;
    for_columns([&](int c, int u, int k) {
      tile.x[c] = widen(px[u].get(k));
      if constexpr (kTeacher) tile.t[c] = widen(pt[u].get(k));
    });
    if constexpr (kCapped) for_columns([&](int c, int, int) { tile.x[c] = cap.value(tile.x[c]); });
    if constexpr (P::kWeights)
      for_columns([&](int c, int u, int k) {
        const int column = i + u * step + k;
        const real* weights = static_cast<const real*>(a.class_weight);
        tile.weights[c] = weights && x.holds(column, 1) ? weights[column] : real(1);
      });
    if (!x.holds(i, (kPacks - 1) * step + kSize))
      for_columns([&](int c, int u, int k) {
        if (x.holds(i + u * step + k, 1)) return;
        tile.x[c] = -Limits<real>::infinity;
        if constexpr (kTeacher)
          tile.t[c] = P::kTarget == Target::kProbs ? real(0) : -Limits<real>::infinity;
        if constexpr (P::kWeights) tile.weights[c] = real(0);
      });
    return tile;
  }

  // Call body(c, u, k) for every column of a tile: column c is element k of pack u.
  template <class Body>
  static __device__ __forceinline__ void for_columns(Body body) {
    FD_UNROLL
    for (int c = 0; c < kColumns<P>; ++c) body(c, c / kSize, c % kSize);
  }

  // Load a thread's packs, which begin at columns i + u * step.
  __device__ __forceinline__ void load(int i, int step, Packs& px, Packs& pt) const {
    if (cached_x.holds(i, (kPacks - 1) * step + kSize)) {
      cached_x.load(i, step, px);
      if constexpr (kTeacher) cached_t.load(i, step, pt);
    } else {
      x.load(i, step, px);
      if constexpr (kTeacher) t.load(i, step, pt);
    }
  }

  // Call body(tile, column, step) for all tiles of a thread.  The first pass fills the cache, which
  // later passes read.
  template <bool kFirst, class Body>
  __device__ __forceinline__ void pass(const Team& team, Body body) const {
    const int step = team.threads * kSize;
    for (int i = x.begin + team.thread * kSize; i < x.end; i += kPacks * step) {
      Packs px, pt;
      // The cache ends with a tile, so this is the same for all threads.
      const bool cached = i < cached_x.end;
      if (!kFirst && cached) {
        FD_UNROLL
        for (int u = 0; u < kPacks; ++u) {
          px[u] = cached_x.at(i + u * step);
          if constexpr (kTeacher) pt[u] = cached_t.at(i + u * step);
        }
      } else {
        x.load(i, step, px);
        if constexpr (kTeacher) t.load(i, step, pt);
        if (kFirst && cached) {
          FD_UNROLL
          for (int u = 0; u < kPacks; ++u) {
            cached_x.at(i + u * step) = px[u];
            if constexpr (kTeacher) cached_t.at(i + u * step) = pt[u];
          }
        }
      }
      body(unpack(px, pt, i, step), i, step);
    }
  }

  // Return the logit of a class, softcapped.
  __device__ __forceinline__ real logit(int64_t i) const {
    const real v = widen(x.row[i]);
    return kCapped ? cap.value(v) : v;
  }
};

}  // namespace fastdiv
