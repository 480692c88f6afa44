// Columns of a row, the loop over them, and what it adds up.
#pragma once

#include <cstring>

#include "numbers.h"

namespace {

// Four independent sums or maxima, so that none waits for the one before, and one more for the last
// columns.
struct Parts {
  Floats<W> four[4];
  Floats<1> rest;

  INLINE explicit Parts(float initial = 0) {
    for (auto& part : four) part = Floats<W>{} + initial;
    rest = Floats<1>{} + initial;
  }
  INLINE void scale(float by) {
    for (auto& part : four) part *= by;
    rest *= by;
  }
  template <class Op>
  INLINE float fold(Op op) const {
    return op(fold(op(op(four[0], four[1]), op(four[2], four[3])), op), rest)[0];
  }

 private:
  template <class V, class Op>
  static INLINE Floats<1> fold(V v, Op op) {
    if constexpr (constexpr int half = sizeof(V) / 8; half == 0) {
      return v;
    } else {
      Floats<half> halves[2];
      memcpy(halves, &v, sizeof v);
      return fold(op(halves[0], halves[1]), op);
    }
  }
};

// Columns that are computed at once: n of them, from `first` on.
template <int n, int part>
struct Columns {
  int64_t first;

  INLINE Floats<n> of(const float* row) const {
    Floats<n> v;
    memcpy(&v, row + first, sizeof v);
    return v;
  }
  template <class T>
  INLINE Floats<n> of(const T* row) const {
    Shorts<n> from;
    memcpy(&from, row + first, sizeof from);
    return T::template widen<n>(from);
  }
  INLINE void put(float* row, Floats<n> v) const { memcpy(row + first, &v, sizeof v); }
  template <class T>
  INLINE void put(T* row, Floats<n> v) const {
    const Shorts<n> narrow = T::template narrow<n>(v);
    memcpy(row + first, &narrow, sizeof narrow);
  }
  // Return the part of a sum that these columns add to.
  INLINE Floats<n>& in(Parts& parts) const {
    if constexpr (n == 1) {
      return parts.rest;
    } else {
      return parts.four[part];
    }
  }
};

// Call body(columns) for all columns from begin to end.
template <class Body>
INLINE void each(int64_t begin, int64_t end, Body body) {
  int64_t i = begin;
  for (; i + 4 * W <= end; i += 4 * W) {
    body(Columns<W, 0>{i});
    body(Columns<W, 1>{i + W});
    body(Columns<W, 2>{i + 2 * W});
    body(Columns<W, 3>{i + 3 * W});
  }
  for (; i + W <= end; i += W) body(Columns<W, 0>{i});
  for (; i < end; ++i) body(Columns<1, 0>{i});
}

// Call body(begin, end) for tiles, which stay in the first cache between two passes over them.
template <class Body>
INLINE void tiles(int64_t classes, Body body) {
  constexpr int64_t tile = 2048;
  for (int64_t i = 0; i < classes; i += tile) body(i, i + tile < classes ? i + tile : classes);
}

}  // namespace
