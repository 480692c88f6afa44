// Launches kernels: on a GPU, or in the tests on a CPU.
#pragma once

#include <utility>

#include "cuda/device.cuh"
#include "cuda/kernels.h"

namespace fastdiv {
namespace cuda {

struct Grid {
  int64_t blocks;
  int threads, cluster;
  int64_t shared;      // bytes of dynamic shared memory
  int64_t max_shared;  // the most that a launch of this kernel may ask for

  // Return why there can be no such grid, or null.
  Status trouble() const {
    return blocks > INT32_MAX ? "more rows than one launch takes" : nullptr;
  }
};

#if defined(__CUDACC__)

// Return the message of an error; null for success.
inline Status status_of(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Let launches of the kernel ask for this many bytes of dynamic shared memory.  Occupancy counts on
// all that a multiprocessor has, so the L1 cache gets none of it.
template <class... Args>
Status allow_shared(void (*kernel)(Args...), int64_t bytes) {
  const std::pair<cudaFuncAttribute, int> attributes[] = {
      {cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)},
      {cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared}};
  for (const auto& [attribute, value] : attributes)
    if (const Status error = status_of(cudaFuncSetAttribute(kernel, attribute, value)))
      return error;
  return nullptr;
}

template <class... Args>
Status start(void (*kernel)(Args...), const Grid& grid, void* stream, Args... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(grid.blocks));
  config.blockDim = dim3(unsigned(grid.threads));
  config.dynamicSmemBytes = size_t(grid.shared);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {unsigned(grid.cluster), 1, 1};
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  return status_of(cudaLaunchKernelEx(&config, kernel, args...));
}

#else

template <class... Args>
Status allow_shared(void (*)(Args...), int64_t bytes) {
  cuda_on_cpu::allow_dynamic_shared(size_t(bytes));
  return nullptr;
}

template <class... Args>
Status start(void (*kernel)(Args...), const Grid& grid, void*, Args... args) {
  static_assert((sizeof(Args) + ... + 0) <= 4096, "a kernel takes at most 4096 bytes of arguments");
  cuda_on_cpu::launch(unsigned(grid.blocks), unsigned(grid.threads), unsigned(grid.cluster),
                      size_t(grid.shared), [=] { kernel(args...); });
  return nullptr;
}

#endif

template <class... Args>
Status launch(void (*kernel)(Args...), const Grid& grid, void* stream, Args... args) {
  if (grid.blocks == 0 || grid.trouble()) return grid.trouble();
  // Without this call a block gets 48 KiB, static arrays included.  All launches of a kernel ask
  // for the same value, because threads share the setting.
  if (grid.shared > 0)
    if (const Status error = allow_shared(kernel, grid.max_shared)) return error;
  return start(kernel, grid, stream, args...);
}

}  // namespace cuda
}  // namespace fastdiv
