// Packs of 16 bytes, in which rows are read and written whatever their alignment.
#pragma once

#include <string.h>

#include <type_traits>

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
  // One access of 16 bytes; the address is aligned.
  static __device__ __forceinline__ Pack read(const void* p) {
    Pack pack;
    load_16(p, pack.words);
    return pack;
  }
  __device__ __forceinline__ void write(void* p) const { store_16(p, words); }

  // Remove the first element, and append one.
  __device__ __forceinline__ void push(T v) {
    FD_UNROLL
    for (int k = 0; k + 1 < kSize; ++k) set(k, get(k + 1));
    set(kSize - 1, v);
  }
};

// How the kernels compute with numbers of this type.
template <class T>
using MathOf = std::conditional_t<sizeof(T) == 2, ApproxMath, ExactMath>;

template <class T, class real>
__device__ __forceinline__ T narrowed(real v) {
  T out;
  narrow(v, &out);
  return out;
}

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

// Elements [begin, end) of a row in global memory.  Nothing outside of them is read or written.
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
  __device__ __forceinline__ Pack<T> at(int i) const { return Pack<T>::read(row + i); }
  // Return at how many places, from `begin` on, whole and aligned runs of `size` elements begin, if
  // one begins at i.
  __device__ __forceinline__ unsigned whole_runs(int i, int size) const {
    return misalignment(i) == 0 && end - begin >= size ? unsigned(end - begin - size + 1) : 0;
  }

  // Load elements [i, i + kSize); those outside are `fill`.
  __device__ __forceinline__ Pack<T> load(int i, T fill) const {
    const int shift = misalignment(i);
    if (shift == 0 && holds(i, kSize)) return at(i);
    if (shift != 0 && holds(i - shift, 2 * kSize)) {
      // Two aligned loads.  The second is also the first load of the next thread.
      const Pack<T> lo = at(i - shift), hi = at(i - shift + kSize);
      return join(lo, hi, unsigned(shift * sizeof(T)));
    }
    return load_elements(i, fill);
  }
  // The same element by element: slowly, and in little code.
  __device__ __forceinline__ Pack<T> load_elements(int i, T fill) const {
    Pack<T> pack{};
#pragma unroll 1
    for (int k = 0; k < kSize; ++k) pack.push(holds(i + k, 1) ? row[i + k] : fill);
    return pack;
  }

  __device__ __forceinline__ void store(int i, const Pack<T>& pack) const {
    if (misalignment(i) == 0 && holds(i, kSize)) {
      pack.write(row + i);
    } else {
      Pack<T> rest = pack;
#pragma unroll 1
      for (int k = 0; k < kSize; ++k) {
        if (holds(i + k, 1)) row[i + k] = rest.get(0);
        rest.push(T{});
      }
    }
  }
};

}  // namespace fastdiv
