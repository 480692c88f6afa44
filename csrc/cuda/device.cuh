// What the kernels use of CUDA.  Without nvcc, tests/cuda_on_cpu runs them on a CPU.
#pragma once

#include "common/math.h"

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define FD_UNROLL _Pragma("unroll")
// Shared memory is declared as bytes, because types with initial values cannot be __shared__.
#define FD_SHARED(T, name, n)                                           \
  __shared__ __align__(16) unsigned char name##_bytes[sizeof(T) * (n)]; \
  T* const name = reinterpret_cast<T*>(name##_bytes)
#define FD_DYNAMIC_SHARED(name)                                   \
  extern __shared__ __align__(16) unsigned char dynamic_shared[]; \
  unsigned char* const name = dynamic_shared

namespace fastdiv {

// Keep a number in a register, so that it is not computed again from kernel arguments at each use.
__device__ __forceinline__ float pin_in_register(float v) {
  asm volatile("" : "+f"(v));
  return v;
}
__device__ __forceinline__ double pin_in_register(double v) {
  asm volatile("" : "+d"(v));
  return v;
}
__device__ __forceinline__ int pin_in_register(int v) {
  asm volatile("" : "+r"(v));
  return v;
}
// Keep the address of a row, too; the compiler still knows that it is global memory.
template <class T>
__device__ __forceinline__ T* pin_in_register(T* p) {
  size_t address = __cvta_generic_to_global(p);
  asm volatile("" : "+l"(address));
  return static_cast<T*>(__cvta_global_to_generic(address));
}

// The same for an address in shared memory.
template <class T>
__device__ __forceinline__ T* pin_shared(T* p) {
  uint32_t address = uint32_t(__cvta_generic_to_shared(p));
  asm volatile("" : "+r"(address));
  return static_cast<T*>(__cvta_shared_to_generic(address));
}

// Load 16 bytes at once.
__device__ __forceinline__ void load_16(const void* p, uint32_t (&words)[4]) {
  const uint4 v = *static_cast<const uint4*>(p);
  words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
}
// Store 16 bytes of global memory at once.  Of a plain store the compiler may make four.
__device__ __forceinline__ void store_16(void* p, const uint32_t (&words)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

// Return the logarithm of a power of two.
__device__ __forceinline__ int log2_of(int n) { return 31 - __clz(n); }

// Add without contraction: two lanes that add the same two numbers must get the same bits.
__device__ __forceinline__ float sum_of_two(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double sum_of_two(double a, double b) { return __dadd_rn(a, b); }

}  // namespace fastdiv

#else

#include "cuda_on_cpu.h"

#define FD_UNROLL

namespace fastdiv {
template <class real>
real pin_in_register(real v) {
  return v;
}
template <class T>
T* pin_shared(T* p) {
  return p;
}
struct alignas(16) Words16 {
  uint32_t words[4];
};
inline void load_16(const void* p, uint32_t (&words)[4]) {
  const Words16 v = *static_cast<const Words16*>(p);
  for (int i = 0; i < 4; ++i) words[i] = v.words[i];
}
inline void store_16(void* p, const uint32_t (&words)[4]) {
  *static_cast<Words16*>(p) = {{words[0], words[1], words[2], words[3]}};
}
inline int log2_of(int n) { return 31 - __builtin_clz(unsigned(n)); }
template <class real>
real sum_of_two(real a, real b) {
  return a + b;
}
}  // namespace fastdiv

#endif
