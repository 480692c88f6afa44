// Vectors for limit.cpp: W floats each, in the vector extensions that g++ and clang++ share.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define INLINE inline __attribute__((always_inline))

namespace {

// --- vectors
// --------------------------------------------------------------------------------------

template <int n>
struct Lanes {
  typedef float Floats __attribute__((vector_size(4 * n)));
  typedef int32_t Ints __attribute__((vector_size(4 * n)));
  typedef uint16_t Halves __attribute__((vector_size(2 * n)));
};
template <int n>
using Floats = typename Lanes<n>::Floats;

struct Bf16 {
  uint16_t bits;
};

constexpr auto plus = [](auto a, auto b) { return a + b; };
constexpr auto larger = [](auto a, auto b) { return a > b ? a : b; };

// Return e^z for z <= 0: 2^n times a polynomial of degree 6 (Cephes).
template <class V>
INLINE V exp_of(V z) {
  using Ints = decltype(z < z);
  z = larger(z, V{} - 87.f);
  const V shifted = z * 1.44269504f + 12582912.f;  // 1.5 * 2^23 rounds to an integer
  const V n = shifted - 12582912.f;
  const V r = z - n * 0.693359375f + n * 2.12194440e-4f;
  V p = 1.3981999507e-3f * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.f);
  return p * (V)(((Ints)shifted << 23) + 0x3f800000);
}

// Return the logarithm of a normal positive number, v = 2^n (1 + f) with |f| < 0.42 (Cephes).
template <class V>
INLINE V log_of(V v) {
  using Ints = decltype(v < v);
  const Ints above = (Ints)v - 0x3f3504f3;  // the bits of sqrt(1/2)
  const V n = __builtin_convertvector(above >> 23, V);
  const V f = (V)((above & 0x7fffff) + 0x3f3504f3) - 1.f;
  V p = 7.0376836292e-2f * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  return f - f * f * (0.5f - f * p) + n * 0.69314718f;
}

// --- a row
// ----------------------------------------------------------------------------------------

// Four independent sums or maxima, so that none waits for the one before, and one of the last
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
    return op(lanes(op(op(four[0], four[1]), op(four[2], four[3])), op), rest)[0];
  }

 private:
  template <class V, class Op>
  static INLINE Floats<1> lanes(V v, Op op) {
    if constexpr (constexpr int n = sizeof(V) / 8; n == 0) {
      return v;
    } else {
      Floats<n> half[2];
      memcpy(half, &v, sizeof v);
      return lanes(op(half[0], half[1]), op);
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
  INLINE Floats<n> of(const Bf16* row) const {
    typename Lanes<n>::Halves h;
    memcpy(&h, row + first, sizeof h);
    return (Floats<n>)(__builtin_convertvector(h, typename Lanes<n>::Ints) << 16);
  }
  INLINE void put(float* row, Floats<n> v) const { memcpy(row + first, &v, sizeof v); }
  INLINE void put(Bf16* row, Floats<n> v) const {
    auto bits = (typename Lanes<n>::Ints)v;
    bits += 0x7fff + ((bits >> 16) & 1);  // rounds to nearest, ties to even
    const auto h = __builtin_convertvector(bits >> 16, typename Lanes<n>::Halves);
    memcpy(row + first, &h, sizeof h);
  }
  INLINE auto& in(Parts& parts) const {
    if constexpr (n == 1)
      return parts.rest;
    else
      return parts.four[part];
  }
};

// Call body(columns) until all columns from begin to end are done.
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

// Call body(begin, end) for tiles that stay in the first cache between two passes over them.
template <class Body>
INLINE void tiles(int64_t classes, Body body) {
  constexpr int64_t tile = 2048;
  for (int64_t i = 0; i < classes; i += tile) body(i, i + tile < classes ? i + tile : classes);
}

// The largest logit of a row so far, to which its sums of exponentials are relative.
template <class T>
struct Largest {
  const T* row;
  float value = -3e38f, moved = 0;  // moved: by which its rise changes the exponents

  // Look through a tile, and tell whether it rises.
  INLINE bool rises(int64_t begin, int64_t end) {
    Parts parts(value);
    each(begin, end, [&](auto at) { at.in(parts) = larger(at.in(parts), at.of(row)); });
    const float before = value;
    value = parts.fold(larger);
    moved = before - value;
    return moved < 0;
  }
};

}  // namespace
