// Copies into shared memory that threads do not wait for, and the barriers at which they arrive.
// Without nvcc, tests/cuda_on_cpu has the same functions.
//
// On Ampere every thread copies packs of its own, in groups (copy_16).  From Hopper on one thread
// asks for a whole stretch (copy_bulk), blocks of a cluster write into each other's shared memory
// (send), and both announce their bytes at a barrier.
#pragma once

#include "cuda/device.cuh"

#if defined(__CUDACC__)

namespace fastdiv {

// Whether the code of this architecture uses copy_bulk and clusters; the tests may choose copy_16.
#ifndef FD_BULK_COPIES
#define FD_BULK_COPIES 1
#endif
__device__ __forceinline__ constexpr bool has_bulk_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return FD_BULK_COPIES != 0;
#else
  return false;
#endif
}

// An mbarrier.  A phase ends when the arrivals and the bytes that it expects are complete; the next
// one then begins.
struct alignas(8) ArrivalBarrier {
  uint64_t state;
};

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

__device__ __forceinline__ void barrier_init(ArrivalBarrier* b, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals)
               : "memory");
}
// Show new barriers to the copy engine and to the cluster.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::
                   : "memory");
}
// Arrive, and let the phase wait for so many bytes.
__device__ __forceinline__ void barrier_expect(ArrivalBarrier* b, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)),
               "r"(bytes)
               : "memory");
}
// Wait until the phase of this parity is complete; phases are numbered from 0.
__device__ __forceinline__ void barrier_wait(ArrivalBarrier* b, unsigned parity) {
  asm volatile(
      "{\n\t"
      ".reg .pred done;\n"
      "WAIT:\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
      "@!done bra WAIT;\n\t"
      "}" ::"r"(shared_address(b)),
      "r"(parity)
      : "memory");
}

// Copy from global to shared memory.  Both addresses and the size are multiples of 16 bytes.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, unsigned bytes,
                                          ArrivalBarrier* b) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(b))
      : "memory");
}
// Let copies that this thread asks for come after what it has read before.
__device__ __forceinline__ void fence_before_copy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Wait for the blocks of a cluster in two steps.  Their memory is not ordered.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}

// Write words to the same place in the shared memory of the cluster's block of that rank, and
// announce them at the barrier in the same place as b.
template <int n>
__device__ __forceinline__ void send(uint32_t* to, unsigned rank, const uint32_t (&words)[n],
                                     ArrivalBarrier* b) {
  static_assert(n == 2, "a send moves 8 bytes");
  uint32_t remote_to, remote_b;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(remote_to)
      : "r"(shared_address(to)), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote_b) : "r"(shared_address(b)), "r"(rank));
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(
          remote_to),
      "r"(words[0]), "r"(words[1]), "r"(remote_b)
      : "memory");
}

#else  // Nothing calls these before Hopper.

__device__ __forceinline__ void barrier_init(ArrivalBarrier*, unsigned) {}
__device__ __forceinline__ void barrier_init_fence() {}
__device__ __forceinline__ void barrier_expect(ArrivalBarrier*, unsigned) {}
__device__ __forceinline__ void barrier_wait(ArrivalBarrier*, unsigned) {}
__device__ __forceinline__ void copy_bulk(void*, const void*, unsigned, ArrivalBarrier*) {}
__device__ __forceinline__ void fence_before_copy() {}
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() {}
template <int n>
__device__ __forceinline__ void send(uint32_t*, unsigned, const uint32_t (&)[n], ArrivalBarrier*) {}

#endif

// Copy 16 bytes, past the L1 cache.
__device__ __forceinline__ void copy_16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global))
               : "memory");
}
// End a group of this thread's copies.
__device__ __forceinline__ void copies_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Wait for all of this thread's groups but the last n.
template <int n>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}

}  // namespace fastdiv

#else

namespace fastdiv {
inline bool has_bulk_copies() { return cuda_on_cpu::architecture() >= 90; }
}  // namespace fastdiv

#endif
