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

// Thread-block clusters; before Hopper a cluster is one block.
__device__ __forceinline__ void cluster_sync() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
#endif
}
// Return the same place in the shared memory of the cluster's block of that rank.
template <class T>
__device__ __forceinline__ T* cluster_peer(T* p, unsigned rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return static_cast<T*>(__cluster_map_shared_rank(p, rank));
#else
  return p;
#endif
}

// Wait until no other block reads this block's shared memory.  Other memory is not ordered.
__device__ __forceinline__ void cluster_leave() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  __cluster_barrier_arrive_relaxed();
  __cluster_barrier_wait();
#endif
}

// Keep a number in a register, so that it is not computed again from kernel arguments at each use.
__device__ __forceinline__ float pin_in_register(float v) {
  asm volatile("" : "+f"(v));
  return v;
}
__device__ __forceinline__ double pin_in_register(double v) {
  asm volatile("" : "+d"(v));
  return v;
}

// Add without contraction: two lanes that add the same two numbers must get the same bits.
__device__ __forceinline__ float sum_of_two(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double sum_of_two(double a, double b) { return __dadd_rn(a, b); }

}  // namespace fastdiv

#else

#include "cuda_on_cpu.h"

#define FD_UNROLL

namespace fastdiv {
inline void cluster_leave() {
  cluster_arrive();
  cluster_wait();
}
template <class real>
real pin_in_register(real v) {
  return v;
}
template <class real>
real sum_of_two(real a, real b) {
  return a + b;
}
}  // namespace fastdiv

#endif
