// The kernels of the CPU or, with FD_CUDA_ON_CPU, those of CUDA, called in the same way.
#pragma once

#include <cstdlib>
#include <thread>
#include <vector>

#include "cpu/kernels.h"
#include "cuda/kernels.h"

namespace fastdiv {

#if defined(FD_CUDA_ON_CPU)

// The program may be linked without the kernels of some dtypes, to save the time to compile them.
namespace cuda {
__attribute__((weak)) const RowKernels* find_f64(LossId, Target) { return nullptr; }
__attribute__((weak)) const RowKernels* find_f16(LossId, Target) { return nullptr; }
__attribute__((weak)) const RowKernels* find_bf16(LossId, Target) { return nullptr; }
}  // namespace cuda

inline const cuda::RowKernels* find(LossId loss, Target target, DType dtype) {
  return cuda::find_kernels(loss, target, dtype);
}
inline void call(cuda::RowKernel kernel, const RowArgs& a) {
  cuda::Gpu gpu;
  if (cuda::describe(0, &gpu) || kernel(a, gpu, nullptr)) std::abort();
}
// Lanes of a warp, blocks, and clusters.  Rows of 4095 and of 8191 end with a stage, off alignment.
const std::vector<int64_t> kClasses = {1, 7, 257, 513, 1027, 4095, 8191, 8193};
const std::vector<int64_t> kShared = {257, 1027, 8197};
constexpr bool kSplits = false;  // a team shares every row

#else

inline const RowKernels* find(LossId loss, Target target, DType dtype) {
  return baseline::find_kernels(loss, target, dtype == DType::kF64);
}
inline void call(RowKernel kernel, const RowArgs& a) { kernel(a, 0, a.rows); }
// About a tile and a segment; several segments.
const std::vector<int64_t> kClasses = {1, 7, 511, 512, 513, 8193}, kShared = {8193, 16385};
constexpr bool kSplits = true;

#endif

// A thread pool for RowArgs::split_columns.
inline void three_threads(int64_t begin, int64_t end, int64_t,
                          void (*body)(int64_t, int64_t, void*), void* context) {
  const int64_t third = (end - begin + 2) / 3;
  std::vector<std::thread> threads;
  for (int64_t i = begin; i < end; i += third)
    threads.emplace_back(body, i, i + third < end ? i + third : end, context);
  for (std::thread& t : threads) t.join();
}

}  // namespace fastdiv
