// The interface of the CUDA kernels.  It includes no header of torch and none of CUDA.
#pragma once

#include "losses/registry.h"
#include "losses/row_args.h"

namespace fastdiv {
namespace cuda {

constexpr int64_t kMaxClasses = int64_t(1) << 30;  // column indices have 32 bits

// The properties of a GPU that launch shapes depend on.
struct Gpu {
  int architecture = 0;       // 90: compute capability 9.0
  int64_t shared_memory = 0;  // the most bytes of a block
  int max_cluster = 1;        // the most blocks of a cluster; a power of two
};

// Null for success, else the message of the driver.
using Status = const char*;
using RowKernel = Status (*)(const RowArgs& args, const Gpu& gpu, void* stream);

struct RowKernels {
  RowKernel forward, backward, forward_grad, terms;  // as in cpu/kernels.h
  LossTraits traits;
};

// Return the kernels of a loss, or null if the loss does not take such a target.
const RowKernels* find_kernels(LossId loss, Target target, DType dtype);

// Write both on the GPU, as one `real` each: *divisor, the sum of the rows' weights for a mean,
// else `batch`; and *value, the sum of the rows' values divided by it.  The rows' values are lost.
Status reduce_rows(const RowArgs& args, bool mean, double batch, void* value, void* divisor,
                   void* stream);

// Describe the current device, whose index this is.  The message says why no kernel runs there.
Status describe(int device, Gpu* gpu);

const char* built_architectures();  // "80 90 100+PTX"
const char* toolkit();              // "13.0"

// Each dtype is compiled separately.
const RowKernels* find_f32(LossId loss, Target target);
const RowKernels* find_f64(LossId loss, Target target);
const RowKernels* find_f16(LossId loss, Target target);
const RowKernels* find_bf16(LossId loss, Target target);

}  // namespace cuda
}  // namespace fastdiv
