// Launches of kernels, on a GPU or on the tests' CPU.
#pragma once

#include "cuda/device.cuh"
#include "cuda/kernels.h"

namespace fastdiv {
namespace cuda {

struct Grid {
  int64_t blocks;
  int threads, cluster;
  int64_t shared;       // bytes of dynamic shared memory
  int64_t most_shared;  // that a launch of this kernel may ask for

  // Null, or why there can be no such grid.
  Status trouble() const {
    return blocks > INT32_MAX ? "more rows than one launch takes" : nullptr;
  }
};

#if defined(__CUDACC__)

// Null where it is success.
inline Status status_of(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class... Args>
Status launch(void (*kernel)(Args...), const Grid& grid, void* stream, Args... args) {
  if (grid.blocks == 0 || grid.trouble()) return grid.trouble();
  // To the same value whatever this launch needs: it is state that threads share.
  if (grid.shared > 48 * 1024)
    if (const Status error = status_of(cudaFuncSetAttribute(
            kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(grid.most_shared))))
      return error;
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
Status launch(void (*kernel)(Args...), const Grid& grid, void*, Args... args) {
  if (grid.blocks > 0 && !grid.trouble())
    cuda_on_cpu::launch(unsigned(grid.blocks), unsigned(grid.threads), unsigned(grid.cluster),
                        size_t(grid.shared), [=] { kernel(args...); });
  return grid.trouble();
}

#endif

}  // namespace cuda
}  // namespace fastdiv
