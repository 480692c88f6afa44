// Reads and writes rows 16 bytes at a time, whatever their alignment.
#pragma once

#include <string.h>

#include "common/dtype.h"
#include "cuda/device.cuh"

namespace fastdiv {

// 16 bytes, held as words.  Eight 16-bit elements would take a register each, and would have to be
// unpacked before the next load is issued.
template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  uint32_t words[4];

  __device__ __forceinline__ T get(int k) const {
    T v;
    if constexpr (sizeof(T) == 2)
      v.bits = uint16_t(words[k / 2] >> 16 * (k % 2));
    else
      memcpy(&v, words + k * sizeof(T) / 4, sizeof(T));
    return v;
  }
  __device__ __forceinline__ void set(int k, T v) {
    if constexpr (sizeof(T) == 2) {
      const uint32_t other = words[k / 2] & (k % 2 ? 0x0000ffffu : 0xffff0000u);
      words[k / 2] = other | uint32_t(v.bits) << 16 * (k % 2);
    } else {
      memcpy(words + k * sizeof(T) / 4, &v, sizeof(T));
    }
  }
};

// Return bytes [shift, shift + 16) of two neighbours.
template <class T>
__device__ __forceinline__ Pack<T> join(const Pack<T>& lo, const Pack<T>& hi, unsigned shift) {
  uint32_t w[8] = {lo.words[0], lo.words[1], lo.words[2], lo.words[3],
                   hi.words[0], hi.words[1], hi.words[2], hi.words[3]};
  FD_UNROLL
  for (int i = 0; i < 6; ++i) w[i] = shift & 8 ? w[i + 2] : w[i];
  FD_UNROLL
  for (int i = 0; i < 5; ++i) w[i] = shift & 4 ? w[i + 1] : w[i];
  Pack<T> out;
  FD_UNROLL
  for (int i = 0; i < 4; ++i)
    out.words[i] = uint32_t((uint64_t(w[i + 1]) << 32 | w[i]) >> (shift & 3) * 8);
  return out;
}

// Elements [begin, end) of a row.  Nothing outside of them is read or written.
template <class T>
struct Stretch {
  static constexpr int kSize = Pack<T>::kSize;
  T* row;
  int begin, end;

  __device__ __forceinline__ bool holds(int i, int size) const {
    return i >= begin && i + size <= end;
  }
  // Return how many elements i lies after a 16-byte boundary.
  __device__ __forceinline__ int misalignment(int i) const {
    return int(reinterpret_cast<uintptr_t>(row + i) % 16 / sizeof(T));
  }
  __device__ __forceinline__ Pack<T>& at(int i) const {
    return *reinterpret_cast<Pack<T>*>(row + i);
  }

  // Load elements [i, i + kSize), which are not aligned; elements outside are 0.
  __device__ __forceinline__ Pack<T> load_unaligned(int i) const {
    const int shift = misalignment(i);
    if (shift != 0 && holds(i - shift, 2 * kSize)) {
      // Two aligned loads.  The second is also the first load of the next thread.
      const Pack<T> lo = at(i - shift), hi = at(i - shift + kSize);
      return join(lo, hi, unsigned(shift * sizeof(T)));
    }
    Pack<T> pack{};
    FD_UNROLL
    for (int k = 0; k < kSize; ++k)
      if (holds(i + k, 1)) pack.set(k, row[i + k]);
    return pack;
  }

  // Load packs[u] from i + u * step.  If all are aligned and inside, the loads are issued at once.
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
        if (holds(i + k, 1)) row[i + k] = pack.get(k);
    }
  }
};

}  // namespace fastdiv
