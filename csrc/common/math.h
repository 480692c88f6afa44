// Scalar mathematics for host and device, in float and double.
//
// The float versions have no branches, so that a loop over them vectorises.  They cover what a
// log-softmax can produce (e^z for z <= 0, log of a positive number) and no more.  The polynomial
// of the logarithm is that of Cephes (S. Moshier), and so is that of exponentials in differences.
#pragma once

#include <math.h>
#include <stdint.h>

#if defined(__CUDACC__)
#define FD_FN __host__ __device__ __forceinline__
#else
#define FD_INLINE __attribute__((always_inline))
#define FD_FN inline FD_INLINE
#endif

#if defined(__CUDA_ARCH__)
#define FD_CUDA  // device code
#elif defined(FD_CUDA_ON_CPU)
#define FD_CUDA
#include "instructions.h"  // of tests/cuda_on_cpu
#endif

#if defined(__CUDA_ARCH__)
#define FD_SIMD(...) _Pragma("unroll")
#else
#define FD_PRAGMA(x) _Pragma(#x)
#define FD_SIMD(...) FD_PRAGMA(omp simd __VA_ARGS__)
#endif

namespace fastdiv {

#if !defined(FD_CUDA_ON_CPU)
// Instructions of a GPU, each with an error of some 2^-22.
FD_FN float exp2_instruction(float v) {
#if defined(__CUDA_ARCH__)
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(v));
  return v;
#else
  return exp2f(v);
#endif
}
FD_FN float log2_instruction(float v) {
#if defined(__CUDA_ARCH__)
  asm("lg2.approx.ftz.f32 %0, %0;" : "+f"(v));
  return v;
#else
  return log2f(v);
#endif
}
FD_FN float quotient_instruction(float a, float b) {
#if defined(__CUDA_ARCH__)
  asm("div.approx.ftz.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
  return a;
#else
  return a / b;
#endif
}
#endif

template <class real>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float lowest = -3.40282347e38f, highest = 3.40282347e38f;
  static constexpr float log_largest = 88;
  static constexpr float log_smallest = -87.3f;  // below it e^z is subnormal and taken as 0
  static constexpr float infinity = __builtin_huge_valf(), nan = __builtin_nanf("");
};
template <>
struct Limits<double> {
  static constexpr double lowest = -1.7976931348623157e308, highest = 1.7976931348623157e308;
  static constexpr double log_largest = 709, log_smallest = -708.3;
  static constexpr double infinity = __builtin_huge_val(), nan = __builtin_nan("");
};

FD_FN float float_from_bits(int32_t i) { return __builtin_bit_cast(float, i); }
FD_FN int32_t bits_of(float f) { return __builtin_bit_cast(int32_t, f); }

template <class real>
FD_FN real abs_of(real v) {
  return v < real(0) ? -v : v;
}
template <class real>
FD_FN bool is_infinite(real v) {  // false for NaN
  return abs_of(v) > Limits<real>::highest;
}

// Return p * v with 0 * inf = 0: a class without mass adds nothing.  A NaN mass gives NaN.
template <class real>
FD_FN real mass_times(real p, real v) {
#if defined(FD_CUDA)
  return p * (p == real(0) ? real(0) : v);  // so that the product can fuse with a sum
#else
  return p == real(0) ? real(0) : p * v;
#endif
}

// The same for a mass that is 0 where its log is -inf, and a log that is not +inf: a GPU then needs
// no test of the mass.
template <class real>
FD_FN real mass_times_log(real p, real log) {
#if defined(FD_CUDA)
  return p * fmax(log, Limits<real>::lowest);
#else
  return mass_times(p, log);
#endif
}

// Return the exact a - b minus the rounded one (Knuth); 0 where that is NaN.
template <class real>
FD_FN real rounding_of(real a, real b) {
  const real difference = a - b, virtual_b = difference - a;
  const real error = (a - (difference - virtual_b)) - (b + virtual_b);
  return error == error ? error : real(0);
}
// Return (a - b) - (c - d) with the rounding errors of both differences.  Logits can be far from
// their maximum but close to each other, or the other way round.  If a or b is infinite, so is the
// result.
template <class real>
FD_FN real difference_of_differences(real a, real b, real c, real d) {
  return ((a - b) - (c - d)) + (rounding_of(a, b) - rounding_of(c, d));
}

// --- exponentials of z <= 0 -------------------------------------------------------------------

// z = n log 2 + r with |r| < 0.35, and scale = 2^n exactly; n = 0 for z > -0.34.
struct Reduced {
  float scale, r;
};
FD_FN Reduced reduced(float z) {
  const float shifted = z * 1.44269504f + 12582912.f;  // 1.5 * 2^23: rounds to an integer
  const float n = shifted - 12582912.f;
  const float r = z - n * 0.693359375f + n * 2.12194440e-4f;
  return {float_from_bits(int32_t((uint32_t(bits_of(shifted)) << 23) + 0x3f800000u)), r};
}

// Return e^z for z <= 0.  It is right for positive z too, up to log_largest.
FD_FN float exp_neg(float z) {
#if defined(__CUDA_ARCH__)
  return expf(z);  // seven instructions, at most two ulps off
#else
  const Reduced e = reduced(z);
  float p = 1.3814540580e-3f * e.r + 8.3687454462e-3f;  // off by 2^-28 of e^z at most
  p = p * e.r + 4.1668388993e-2f;
  p = p * e.r + 1.6666521132e-1f;
  p = p * e.r + 4.9999994040e-1f;
  p = p * e.r + 1.f;
  p = p * e.r + 1.f;
  return z < Limits<float>::log_smallest ? 0.f : e.scale * p;
#endif
}
FD_FN double exp_neg(double z) { return exp(z); }

// Return e^(z scale) with a relative error of some 2^-22 (1 + |z scale|), for sums of many terms. A
// GPU has one instruction for it.
FD_FN float approx_exp(float z, float scale) {
#if defined(FD_CUDA)
  return exp2_instruction(z * (scale * 1.44269504f));
#else
  return exp_neg(z * scale);
#endif
}
FD_FN double approx_exp(double z, double scale) { return exp(z * scale); }

// The functions of z = -|log q - log p| from which every divergence is built.  All are accurate to
// the last digits, also as z -> 0, where the textbook forms cancel.
template <class real>
struct ExpGap {
  real z;    // clamped to where e^z is a normal number
  real e;    // e^z
  real em1;  // e^z - 1
  real chi;  // e^z - 1 - z          = z^2/2 + ...   (+inf at z = -inf)
  real phi;  // z e^z - (e^z - 1)    = z^2/2 + ...   (1 at z = -inf)
};

// e^z = scale * (1 + r + tail) with tail = O(r^2), of which every digit counts.
struct ExpParts {
  float scale, r, tail;
};
FD_FN ExpParts exp_parts(float z) {
  const Reduced e = reduced(z);
  float p = 1.9875691500e-4f * e.r + 1.3981999507e-3f;
  p = p * e.r + 8.3334519073e-3f;
  p = p * e.r + 4.1665795894e-2f;
  p = p * e.r + 1.6666665459e-1f;
  p = p * e.r + 5.0000001201e-1f;
  return {e.scale, e.r, p * (e.r * e.r)};
}

FD_FN ExpGap<float> exp_gap(float z) {
  const bool gone = z < Limits<float>::log_smallest;
  const float c = gone ? Limits<float>::log_smallest : z;
  const ExpParts x = exp_parts(c);
  ExpGap<float> g;
  g.z = c;
  g.e = gone ? 0.f : x.scale * (x.tail + x.r + 1.f);
  g.em1 = x.scale * (x.r + x.tail) + (x.scale - 1.f);
  // For n = 0 the bracket is exactly 0, and chi is the tail of the polynomial.
  const float chi = x.scale * x.tail + ((x.scale * x.r - c) + (x.scale - 1.f));
  g.chi = gone ? -1.f - z : chi;
  g.phi = c > -0.5f ? c * g.em1 - chi : c * g.e - g.em1;
  return g;
}

FD_FN ExpGap<double> exp_gap(double z) {
  ExpGap<double> g;
  g.z = z < -700.0 ? -700.0 : z;
  g.e = exp(z);
  g.em1 = expm1(z);
  double tail = 1.0 / 39916800;  // 1/11!, Taylor series of (e^z - 1 - z) / z^2
  const double inverse_factorial[] = {1.0 / 3628800, 1.0 / 362880, 1.0 / 40320,
                                      1.0 / 5040,    1.0 / 720,    1.0 / 120,
                                      1.0 / 24,      1.0 / 6,      1.0 / 2};
  for (double c : inverse_factorial) tail = tail * z + c;
  g.chi = z > -0.125 ? z * z * tail : g.em1 - z;
  g.phi = z > -0.5 ? z * g.em1 - g.chi : g.z * g.e - g.em1;
  return g;
}

// --- logarithms -------------------------------------------------------------------------------

// log(1 + m) = m + log_tail(m) for |m| < 0.42.
FD_FN float log_tail(float m) {
  float p = 7.0376836292e-2f * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const float square = m * m;
  return m * square * p - 0.5f * square;
}

// v = 2^k (1 + m) with 1 + m in [sqrt(1/2), sqrt(2)), for normal v > 0.
struct LogParts {
  float k, m;
};
FD_FN LogParts log_parts(float v) {
  const int32_t bits = bits_of(v), k = int32_t(uint32_t(bits) - 0x3f3504f3u) >> 23;
  return {float(k), float_from_bits(bits - int32_t(uint32_t(k) << 23)) - 1.f};
}

FD_FN float log_of_parts(float k, float m) {
  return m + (log_tail(m) + k * -2.12194440e-4f) + k * 0.693359375f;
}

// Return log v of a normal positive number.  For 0 the result is finite or -inf.
FD_FN float log_positive(float v) {
#if defined(__CUDA_ARCH__)
  return logf(v);  // at most one ulp off
#else
  const LogParts l = log_parts(v);
  return log_of_parts(l.k, l.m);
#endif
}
FD_FN double log_positive(double v) { return log(v); }

// Return log v of any number: -inf for 0, NaN below 0.
FD_FN float log_of(float v) {
#if defined(__CUDA_ARCH__)
  return logf(v);
#else
  const bool tiny = v < 1.17549435e-38f;
  const LogParts l = log_parts(tiny ? v * 16777216.f : v);
  const float value = log_of_parts(tiny ? l.k - 24.f : l.k, l.m);
  const float positive = v > Limits<float>::highest ? v : value;
  const float nan = v - v + float_from_bits(0x7fc00000);
  return v > 0.f ? positive : (v == 0.f ? -HUGE_VALF : nan);
#endif
}
FD_FN double log_of(double v) { return log(v); }

// --- how logs and exponentials of single classes are computed ----------------------------------

// To the last digits, in nats.
struct ExactMath {
  template <class real>
  static constexpr real kUnit = 1;  // in nats
  template <class real>
  static FD_FN real exp(real log) {
    return exp_neg(log);
  }
  template <class real>
  static FD_FN real log(real v) {
    return log_positive(v);
  }
  template <class real>
  static FD_FN real quotient(real a, real b) {
    return a / b;
  }
};

// With one instruction each and an error of some 2^-22, in bits: for rows of 16 bits on a GPU.
struct ApproxMath {
  template <class real>
  static constexpr real kUnit = real(0.693147180559945309);
  static FD_FN float exp(float log) { return exp2_instruction(log); }
  // A mixture of two normal numbers may be smaller than all of them, and would be taken as 0.
  static FD_FN float log(float v) {
    const float smallest = 1.17549435e-38f;
    return log2_instruction(v < smallest ? smallest : v);
  }
  static FD_FN float quotient(float a, float b) { return quotient_instruction(a, b); }
};

// log(1 + u) and psi = (1 + u) log(1 + u) - u = u^2/2 + ..., for u in [-1, 0].
template <class real>
struct Log1p {
  real value, psi;
};
// v is 1 + u as the caller computed it.  Near u = -1, v has digits that u has lost.  Near u = 0, u
// has digits that v has lost.
FD_FN Log1p<float> log1p_gap(float u, float v) {
  const LogParts l = log_parts(v);
  const bool near = l.k == 0.f;  // of 0, where 1 + m is v
  const float m = near ? u : l.m;
  const float tail = log_tail(m) + l.k * -2.12194440e-4f;
  const float value = m + tail + l.k * 0.693359375f + (u - u);  // u - u keeps a NaN
  return {value, near ? u * u + v * tail : v * value - u};
}
FD_FN Log1p<double> log1p_gap(double u, double v) {
  const double value = u < -0.5 ? log(v < 1e-300 ? 1e-300 : v) : log1p(u);
  double tail = -1.0 / 12;  // log1p(u) - u = -u^2/2 + u^3/3 - ...
  const double inverse[] = {1.0 / 11, -1.0 / 10, 1.0 / 9,  -1.0 / 8, 1.0 / 7,
                            -1.0 / 6, 1.0 / 5,   -1.0 / 4, 1.0 / 3,  -1.0 / 2};
  for (double c : inverse) tail = tail * u + c;
  return {value, u > -0.03125 ? u * u + v * u * u * tail : v * value - u};
}

// --- maxima -----------------------------------------------------------------------------------

// Return the larger number; b if a is NaN.
template <class real>
FD_FN real larger_of(real a, real b) {
#if defined(__CUDA_ARCH__)
  return fmax(a, b);
#else
  return a > b ? a : b;
#endif
}
template <class real>
FD_FN real max_of(const real* x, int n, real m) {
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int i = 0; i < n; ++i) m = larger_of(x[i], m);
  return m;
}

// --- softcap ----------------------------------------------------------------------------------

// cap * tanh(x / cap) and its derivative with respect to x.
template <class real>
struct Softcap {
  real cap;
  FD_FN real value(real x) const {
    const real u = x / cap;
    const real em1 = exp_gap(real(-2) * abs_of(u)).em1;
    const real magnitude = cap * (-em1 / (real(2) + em1));
    return u < real(0) ? -magnitude : (u == u ? magnitude : u);
  }
  FD_FN real slope(real x) const {
    const real e = exp_gap(real(-2) * abs_of(x / cap)).e;
    return real(4) * e / ((real(1) + e) * (real(1) + e));
  }
};

}  // namespace fastdiv
