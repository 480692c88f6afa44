#include "cpu/isa.h"

#if defined(__x86_64__)
FD_BEGIN_ISA("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c" FD_WIDE_VECTORS)
#define FD_ISA avx512
#define FD_F16C
#define FD_AVX512_BF16
#define FD_LANES 16
#include "cpu/rows.inl"
FD_END_ISA

const fastdiv::RowKernels* fastdiv::avx512::find_kernels(LossId loss, Target target, bool f64) {
  return f64 ? baseline::find_kernels(loss, target, f64)
             : fastdiv::find_kernels<float, Kernels>(loss, target);
}
#endif
