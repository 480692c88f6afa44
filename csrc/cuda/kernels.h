// The kernels as the torch side sees them: no torch header below, no CUDA header above.
#pragma once

#include "losses/registry.h"
#include "losses/row_args.h"

namespace fastdiv {
namespace cuda {

constexpr int64_t kMaxClasses = int64_t(1) << 30;  // columns are counted in 32 bits

// What the launch shapes depend on.
struct Gpu {
  int architecture = 0;       // 90: compute capability 9.0
  int64_t shared_memory = 0;  // bytes that a block may have
};

// Null: all is well, or the driver's message.
using Status = const char*;
using RowKernel = Status (*)(const RowArgs& args, const Gpu& gpu, void* stream);

struct RowKernels {
  RowKernel forward, backward, forward_grad, terms;  // as in cpu/kernels.h
  LossTraits traits;
};

// Null where the loss does not take such a target.
const RowKernels* find_kernels(LossId loss, Target target, DType dtype);

// Write *value, the sum of the rows' values over *divisor, and *divisor: the sum of the rows'
// weights for a mean, else `batch`.  Both are one `real` on the GPU.
Status reduce_rows(const RowArgs& args, bool mean, double batch, void* value, void* divisor,
                   void* stream);

// Of the current device, whose index this is; the message says why no kernel runs there.
Status describe(int device, Gpu* gpu);

const char* built_architectures();  // "80 90 100+PTX"
const char* toolkit();              // "13.0"

// One table for each dtype, compiled separately.
const RowKernels* find_f32(LossId loss, Target target);
const RowKernels* find_f64(LossId loss, Target target);
const RowKernels* find_f16(LossId loss, Target target);
const RowKernels* find_bf16(LossId loss, Target target);

}  // namespace cuda
}  // namespace fastdiv
