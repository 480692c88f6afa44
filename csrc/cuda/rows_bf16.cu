#include "cuda/rows.cuh"

const fastdiv::cuda::RowKernels* fastdiv::cuda::find_bf16(LossId loss, Target target) {
  return fastdiv::find_kernels<float, Kernels<BFloat16>>(loss, target);
}
