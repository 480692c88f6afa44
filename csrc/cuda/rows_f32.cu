#include "cuda/rows.cuh"

const fastdiv::cuda::RowKernels* fastdiv::cuda::find_f32(LossId loss, Target target) {
  return fastdiv::find_kernels<float, Kernels<float>>(loss, target);
}
