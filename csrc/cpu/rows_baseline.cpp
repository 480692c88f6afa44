// The row kernels for any machine, and those in double precision.  These call libm element by
// element, so a wider instruction set would not make them faster.
#include "cpu/isa.h"

#define FD_ISA baseline
#define FD_LANES 8
#include "cpu/rows.inl"

const fastdiv::RowKernels* fastdiv::baseline::find_kernels(LossId loss, Target target, bool f64) {
  return f64 ? fastdiv::find_kernels<double, Kernels>(loss, target)
             : fastdiv::find_kernels<float, Kernels>(loss, target);
}
