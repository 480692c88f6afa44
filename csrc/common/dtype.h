// Conversion between 16-bit floats and float.  A GPU has instructions for it.  A CPU uses integer
// arithmetic, which every instruction set vectorises; GCC 12 does not vectorise stores of _Float16.
// With F16C, cpu/tiles.inl uses its instructions.  Half conversion follows M. Dukhan's FP16 (MIT).
#pragma once

#include "common/math.h"

namespace fastdiv {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

FD_FN float widen(BFloat16 v) { return float_from_bits(int32_t(uint32_t(v.bits) << 16)); }

FD_FN float widen(Half v) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(v.bits));
  return wide;
#else
  const uint32_t w = uint32_t(v.bits) << 16, twice = w + w;
  const float normal = float_from_bits(int32_t((twice >> 4) + (0xe0u << 23))) * 0x1p-112f;
  const float subnormal = float_from_bits(int32_t((twice >> 17) | 0x3f000000u)) - 0.5f;
  const uint32_t magnitude = uint32_t(bits_of(twice < (1u << 27) ? subnormal : normal));
  return float_from_bits(int32_t((w & 0x80000000u) | magnitude));
#endif
}

FD_FN void narrow(float v, BFloat16* out) {  // to nearest, ties to even
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out->bits) : "f"(v));
#else
  const uint32_t u = uint32_t(bits_of(v));
  out->bits = v != v ? 0x7fc0 : uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
#endif
}

FD_FN void narrow(float v, Half* out) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out->bits) : "f"(v));
#else
  const uint32_t w = uint32_t(bits_of(v)), twice = w + w, sign = w & 0x80000000u;
  float base = float_from_bits(int32_t(w & 0x7fffffffu)) * 0x1p112f * 0x1p-110f;
  uint32_t bias = twice & 0xff000000u;
  bias = bias < 0x71000000u ? 0x71000000u : bias;
  base = float_from_bits(int32_t((bias >> 1) + 0x07800000u)) + base;
  const uint32_t bits = uint32_t(bits_of(base));
  const uint32_t magnitude = ((bits >> 13) & 0x7c00u) + (bits & 0x0fffu);
  out->bits = uint16_t((sign >> 16) | (twice > 0xff000000u ? 0x7e00u : magnitude));
#endif
}
// No conversion: the kernels compute in these types.
FD_FN float widen(float v) { return v; }
FD_FN double widen(double v) { return v; }
FD_FN void narrow(float v, float* out) { *out = v; }
FD_FN void narrow(double v, double* out) { *out = v; }

}  // namespace fastdiv
