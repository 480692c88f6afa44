#include "cuda/rows.cuh"

const fastdiv::cuda::RowKernels* fastdiv::cuda::find_f64(LossId loss, Target target) {
  return fastdiv::find_kernels<double, Kernels<double>>(loss, target);
}
