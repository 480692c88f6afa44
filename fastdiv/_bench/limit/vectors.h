// Vectors in the extensions that g++ and clang++ share, and their exponential and logarithm.
#pragma once

#include <cstdint>

#define INLINE inline __attribute__((always_inline))

namespace {

template <int n>
struct Lanes {
  typedef float Floats __attribute__((vector_size(4 * n)));
  typedef int32_t Ints __attribute__((vector_size(4 * n)));
  typedef uint16_t Shorts __attribute__((vector_size(2 * n)));
};
template <int n>
using Floats = typename Lanes<n>::Floats;
template <int n>
using Ints = typename Lanes<n>::Ints;
template <int n>
using Shorts = typename Lanes<n>::Shorts;

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

// Return the logarithm of a normal positive number, 2^n (1 + f) with |f| < 0.42 (Cephes).
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

}  // namespace
