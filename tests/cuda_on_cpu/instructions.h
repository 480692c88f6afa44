// The approximate instructions of a GPU, in which the kernels compute exponentials and logarithms.
//
// They are as far off as NVIDIA's documentation allows: 2^-22, relative for exponentials, and
// absolute for logarithms of numbers near 1.  How far, and in which direction, depends on the bits
// of the argument, so the same argument always gives the same result.
#pragma once

#include <cmath>
#include <cstdint>

namespace fastdiv {

// Return a number in [-1, 1] that looks random.
inline float noise_of(float v) {
  uint32_t bits = __builtin_bit_cast(uint32_t, v);
  bits = (bits ^ bits >> 15) * 0x2c1b3c6du;
  bits = (bits ^ bits >> 12) * 0x297a2d39u;
  return float(int32_t(bits ^ bits >> 15)) * 0x1p-31f;
}

// ex2.approx.ftz.f32
inline float exp2_instruction(float v) {
  if (v < -126.f) return 0.f;
  return std::exp2(v) * (1.f + noise_of(v) * 0x1p-22f);
}

// lg2.approx.ftz.f32
inline float log2_instruction(float v) {
  if (v >= 0.f && v < 0x1p-126f) return -INFINITY;
  const float log2 = std::log2(v), size = std::fabs(log2) > 1.f ? std::fabs(log2) : 1.f;
  return std::isfinite(log2) && log2 != 0.f ? log2 + noise_of(v) * size * 0x1p-22f : log2;
}

// div.approx.ftz.f32
inline float quotient_instruction(float a, float b) {
  const float quotient = a / b;
  return std::isfinite(quotient) ? quotient * (1.f + noise_of(quotient) * 0x1p-22f) : quotient;
}

}  // namespace fastdiv
