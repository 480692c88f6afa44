#include "cpu/isa.h"

#if defined(__x86_64__)
FD_BEGIN_ISA("avx2,fma,f16c")
#define FD_ISA avx2
#define FD_F16C
#define FD_LANES 8
#include "cpu/rows.inl"
FD_END_ISA

const fastdiv::RowKernels* fastdiv::avx2::find_kernels(LossId loss, Target target, bool f64) {
  return f64 ? baseline::find_kernels(loss, target, f64)
             : fastdiv::find_kernels<float, Kernels>(loss, target);
}
#endif
