// Rows in memory, 16 bytes at a time, whatever their alignment.
#pragma once

#include "common/dtype.h"
#include "cuda/device.cuh"

namespace fastdiv {

template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T v[kSize];
};

struct alignas(16) Words {
  uint32_t w[4];
};

// Bytes [shift, shift + 16) of two neighbours.
__device__ __forceinline__ Words join(const Words& lo, const Words& hi, unsigned shift) {
  uint32_t w[8] = {lo.w[0], lo.w[1], lo.w[2], lo.w[3], hi.w[0], hi.w[1], hi.w[2], hi.w[3]};
  FD_UNROLL
  for (int i = 0; i < 6; ++i) w[i] = shift & 8 ? w[i + 2] : w[i];
  FD_UNROLL
  for (int i = 0; i < 5; ++i) w[i] = shift & 4 ? w[i + 1] : w[i];
  Words out;
  FD_UNROLL
  for (int i = 0; i < 4; ++i)
    out.w[i] = uint32_t((uint64_t(w[i + 1]) << 32 | w[i]) >> (shift & 3) * 8);
  return out;
}

// Elements [begin, end) of a row; nothing outside of them is touched.
template <class T>
struct Stretch {
  static constexpr int kSize = Pack<T>::kSize;
  T* row;
  int begin, end;

  __device__ __forceinline__ bool holds(int i, int size) const {
    return i >= begin && i + size <= end;
  }
  // How many elements i lies after a 16-byte boundary.
  __device__ __forceinline__ int misalignment(int i) const {
    return int(reinterpret_cast<uintptr_t>(row + i) % 16 / sizeof(T));
  }
  __device__ __forceinline__ Pack<T>& at(int i) const {
    return *reinterpret_cast<Pack<T>*>(row + i);
  }

  // Elements [i, i + kSize) of a row that is not aligned there, zeros for those outside.
  __device__ __forceinline__ Pack<T> load_unaligned(int i) const {
    Pack<T> pack{};
    const int shift = misalignment(i);
    if (shift != 0 && holds(i - shift, 2 * kSize)) {
      // Two aligned loads, of which the second is a neighbouring thread's first.
      const Words lo = *reinterpret_cast<const Words*>(row + i - shift);
      const Words hi = *reinterpret_cast<const Words*>(row + i - shift + kSize);
      reinterpret_cast<Words&>(pack) = join(lo, hi, unsigned(shift * sizeof(T)));
    } else {
      FD_UNROLL
      for (int k = 0; k < kSize; ++k)
        if (holds(i + k, 1)) pack.v[k] = row[i + k];
    }
    return pack;
  }

  // packs[u] = elements from i + u * step; where nothing is special, all loads at once.
  template <int n>
  __device__ __forceinline__ void load(int i, int step, Pack<T> (&packs)[n]) const {
    if (misalignment(i) == 0 && holds(i, (n - 1) * step + kSize)) {
      FD_UNROLL
      for (int u = 0; u < n; ++u) packs[u] = at(i + u * step);
    } else {
      FD_UNROLL
      for (int u = 0; u < n; ++u) packs[u] = load_unaligned(i + u * step);
    }
  }

  __device__ __forceinline__ void store(int i, const Pack<T>& pack) const {
    if (misalignment(i) == 0 && holds(i, kSize)) {
      at(i) = pack;
    } else {
      FD_UNROLL
      for (int k = 0; k < kSize; ++k)
        if (holds(i + k, 1)) row[i + k] = pack.v[k];
    }
  }
};

}  // namespace fastdiv
