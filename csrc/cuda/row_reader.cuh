// What the kernels read of a row: its arguments, and packs unpacked into numbers.
#pragma once

#include "cuda/mask.cuh"
#include "cuda/pack.cuh"
#include "losses/gradient.h"
#include "losses/row.h"

namespace fastdiv {

// Return a row of a matrix.
template <class T>
__device__ __forceinline__ T* row_of(const Matrix& m, int64_t r) {
  return static_cast<T*>(m.data) + r * m.stride;
}

// kCapped: logits are softcapped.  That takes so many registers that it has kernels of its own.
template <class P, class T, bool kCapped>
struct RowReader {
  using Policy = P;
  using Element = T;
  using real = typename P::real;
  using Record = typename P::Record;
  static constexpr bool kIsCapped = kCapped;
  static constexpr Target kTarget = P::kTarget;
  static constexpr bool kTeacher = kTarget != Target::kNone;
  static constexpr int kStreams = kTeacher ? 2 : 1;
  static constexpr int kSize = Pack<T>::kSize;

  const RowArgs& a;
  const P loss;
  const real scale;
  const Softcap<real> cap;
  T *const x, *const t;
  const uint8_t* const mask;  // of the row, or null
  const int begin, end;       // the columns that are read

  __device__ __forceinline__ RowReader(const RowArgs& args, int64_t r, int begin, int end)
      : a(args),
        loss(args.params),
        scale(pin_in_register(args.scale_of<real>(r))),
        cap{real(args.softcap)},
        x(pin_in_register(row_of<T>(args.x, r))),
        t(kTeacher ? pin_in_register(row_of<T>(args.t, r)) : nullptr),
        mask(args.mask.row(r)),
        begin(pin_in_register(begin)),
        end(pin_in_register(end)) {}

  static __device__ __forceinline__ T no_logit() { return narrowed<T>(-Limits<real>::infinity); }
  static __device__ __forceinline__ T no_target() {
    return narrowed<T>(kTarget == Target::kProbs ? real(0) : -Limits<real>::infinity);
  }

  // kPacks packs of each row, which begin `step` columns apart, as numbers.
  template <int kPacks>
  struct Tile {
    static constexpr int kColumns = kPacks * kSize;
    real x[kColumns], t[kColumns], weights[kColumns];

    // Call body(c, u, k) for every column: column c is element k of pack u.
    template <class Body>
    static __device__ __forceinline__ void for_columns(Body body) {
      FD_UNROLL
      for (int c = 0; c < kColumns; ++c) body(c, c / kSize, c % kSize);
    }
  };

  // Unpack a tile whose first pack begins at column i.  Columns outside of the row have no mass on
  // either side, so they add nothing; the packs hold no_logit() and no_target() there.
  template <int kPacks>
  __device__ __forceinline__ Tile<kPacks> unpack(const Pack<T> (&px)[kPacks],
                                                 const Pack<T> (&pt)[kPacks], int i,
                                                 int step) const {
    Tile<kPacks> tile;
    tile.for_columns([&](int c, int u, int k) {
      tile.x[c] = widen(px[u].get(k));
      if constexpr (kTeacher) tile.t[c] = widen(pt[u].get(k));
    });
    const bool whole = i >= begin && i + (kPacks - 1) * step + kSize <= end;
    const auto outside = [&](int u, int k) {
      const int column = i + u * step + k;
      return !whole && (column < begin || column >= end);
    };
    if constexpr (kCapped)
      tile.for_columns([&](int c, int u, int k) {
        tile.x[c] = outside(u, k) ? -Limits<real>::infinity : cap.value(tile.x[c]);
      });
    if constexpr (P::kWeights) {
      const real* const weights = static_cast<const real*>(a.class_weight);
      tile.for_columns([&](int c, int u, int k) {
        tile.weights[c] = outside(u, k) ? real(0) : weights ? weights[i + u * step + k] : real(1);
      });
    }
    if (mask) {
      const real nothing = widen(no_target());
      each_masked<kPacks>(i, step, [&](int c) {
        tile.x[c] = -Limits<real>::infinity;
        if constexpr (kTeacher) tile.t[c] = nothing;
      });
    }
    return tile;
  }

  // Call body(c) for every column of a tile that takes no part.
  template <int kPacks, class Body>
  __device__ __forceinline__ void each_masked(int i, int step, Body body) const {
    FD_UNROLL
    for (int u = 0; u < kPacks; ++u) {
      const unsigned which = taking_part<kSize>(a.mask, mask, i + u * step, begin, end);
      FD_UNROLL
      for (int k = 0; k < kSize; ++k)
        if (!(which >> k & 1)) body(u * kSize + k);
    }
  }

  __device__ __forceinline__ real raw_logit(int64_t i) const { return widen(x[i]); }
  // Return the logit of a class, softcapped and masked.
  __device__ __forceinline__ real logit(int64_t i) const {
    if (mask && !a.mask.has(mask, i)) return -Limits<real>::infinity;
    return kCapped ? cap.value(raw_logit(i)) : raw_logit(i);
  }
};

}  // namespace fastdiv
