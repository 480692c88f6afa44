// Runs CUDA kernels on the CPU, for tests on machines without a GPU.  Kernel sources are compiled
// as C++17 with this header in place of cuda_runtime.h.  No CUDA toolkit is needed.
//
// Each CUDA thread is a fiber.  The threads of a block, or of a cluster, take turns on one OS
// thread, in an order chosen by FASTDIV_SHIM_ORDER (scheduler.h); blocks run one after the other.
// Asynchronous copies land when FASTDIV_SHIM_COPIES says (landing.h).  One launch at a time in a
// process.
//
// What is found:
//   always                 threads that wait for each other forever, misuse of shuffles, barriers
//                          and copies, launches that a GPU refuses, and what makes a result wrong
//                          in some order (fresh shared memory and what a copy will write are NaN)
//   -fsanitize=address     accesses and copies outside of an array in shared memory, or of a
//                          finished block's, and copies from outside of global memory
//   -fsanitize=undefined   vector accesses that are not aligned: a GPU faults, x86 does not
//   -fsanitize=thread      accesses of two threads that no barrier or shuffle orders, and copies
//                          that are not ordered with the accesses of threads
//
// Not modelled: the rounding of approximate functions, races between blocks of different clusters,
// warps that wait for another block by spinning, memory fences other than those in async.h, speed.
#pragma once

#include "async.h"
#include "emulated_gpu.h"
#include "launch.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
// g++ knows __restrict__ itself; threadIdx, blockIdx, blockDim and gridDim are in device.h.

// Declares T* name: n elements that belong to the block, aligned to 16 bytes.
#define FD_SHARED(T, name, n)                                                           \
  static char name##_site; /* its address identifies the declaration for all threads */ \
  T* const name = ::cuda_on_cpu::static_shared<T>(&name##_site, n)

// Declares unsigned char* name: the bytes that the launch asked for, aligned to 16 bytes.
#define FD_DYNAMIC_SHARED(name) unsigned char* const name = ::cuda_on_cpu::dynamic_shared()

inline void __syncthreads() { cuda_on_cpu::block_sync(); }
inline void __syncwarp(unsigned mask = ~0u) { cuda_on_cpu::warp_sync(mask); }

// T has 4 or 8 bytes.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  return cuda_on_cpu::shuffle("__shfl_xor_sync", mask, value,
                              [=](unsigned lane) { return lane ^ unsigned(lane_mask); });
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return cuda_on_cpu::shuffle("__shfl_sync", mask, value,
                              [=](unsigned) { return unsigned(lane) % cuda_on_cpu::kWarpSize; });
}

// --- thread-block clusters

inline void cluster_sync() { cuda_on_cpu::cluster_sync(); }
inline unsigned cluster_rank() { return cuda_on_cpu::cluster_rank(); }

// Return the same place as p in the shared memory of the block of that rank.  That block must have
// started, and must not have finished when the memory is accessed.  So call cluster_sync() before
// the first access and after the last.
template <class T>
T* cluster_peer(T* p, unsigned rank) {
  return cuda_on_cpu::peer(p, rank);
}
