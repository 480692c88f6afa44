// What the kernels need of CUDA.  Without nvcc, tests/cuda_on_cpu runs them on a CPU.
#pragma once

#include "common/math.h"

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define FD_UNROLL _Pragma("unroll")
// Shared memory as bytes: types with initial values may not be __shared__.
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
// The same place in the shared memory of the cluster's block of that rank.
template <class T>
__device__ __forceinline__ T* cluster_peer(T* p, unsigned rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return static_cast<T*>(__cluster_map_shared_rank(p, rank));
#else
  return p;
#endif
}

}  // namespace fastdiv

#else

#include "cuda_on_cpu.h"

#define FD_UNROLL

#endif
