// Numbers of 16 bits.  The intrinsics do what g++ 12 takes several instructions for.
#pragma once

#include "vectors.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

template <int n>
INLINE Ints<n> ints_of(Shorts<n> from) {
#ifdef __AVX512F__
  if constexpr (n == 16) return (Ints<16>)_mm512_cvtepu16_epi32((__m256i)from);
#endif
#ifdef __AVX2__
  if constexpr (n == 8) return (Ints<8>)_mm256_cvtepu16_epi32((__m128i)from);
#endif
  return __builtin_convertvector(from, Ints<n>);
}

// Return the upper halves.
template <int n>
INLINE Shorts<n> shorts_of(Ints<n> from) {
#ifdef __AVX512F__
  if constexpr (n == 16) return (Shorts<16>)_mm512_cvtepi32_epi16((__m512i)(from >> 16));
#endif
#ifdef __AVX2__
  if constexpr (n == 8) {
    const __m256i upper = _mm256_srli_epi32((__m256i)from, 16);
    const __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi32(upper, upper), 0x08);
    return (Shorts<8>)_mm256_castsi256_si128(both);
  }
#endif
  return __builtin_convertvector(from >> 16, Shorts<n>);
}

struct Bf16 {
  uint16_t bits;

  template <int n>
  static INLINE Floats<n> widen(Shorts<n> from) {
    return (Floats<n>)(ints_of<n>(from) << 16);
  }
  template <int n>
  static INLINE Shorts<n> narrow(Floats<n> from) {
    const Ints<n> bits = (Ints<n>)from;
    return shorts_of<n>(bits + 0x7fff + ((bits >> 16) & 1));  // to nearest, ties to even
  }
};

#ifdef __F16C__
struct F16 {
  uint16_t bits;

  template <int n>
  static INLINE Floats<n> widen(Shorts<n> from) {
#ifdef __AVX512F__
    if constexpr (n == 16) return (Floats<16>)_mm512_cvtph_ps((__m256i)from);
#endif
    if constexpr (n == 8) return (Floats<8>)_mm256_cvtph_ps((__m128i)from);
    if constexpr (n == 1) return Floats<1>{_cvtsh_ss(from[0])};
  }
  template <int n>
  static INLINE Shorts<n> narrow(Floats<n> from) {
#ifdef __AVX512F__
    if constexpr (n == 16) return (Shorts<16>)_mm512_cvtps_ph((__m512)from, 0);
#endif
    if constexpr (n == 8) return (Shorts<8>)_mm256_cvtps_ph((__m256)from, 0);
    if constexpr (n == 1) return Shorts<1>{_cvtss_sh(from[0], 0)};
  }
};
#endif

}  // namespace
