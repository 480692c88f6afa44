// The kernels of each instruction set, and the choice of one.
#pragma once

#include "losses/registry.h"
#include "losses/row_args.h"

namespace fastdiv {

using RowKernel = void (*)(const RowArgs& args, int64_t begin, int64_t end);

// The kernels of a loss, each over rows [begin, end).
struct RowKernels {
  RowKernel forward;  // value and record
  // Null for a loss with statistics, whose gradients are those of the loss without.
  RowKernel backward;  // gradients from the record
  // Value and gradients, while the row is in the cache.  Null for named classes, too, whose
  // upstream gradients are never known in advance.
  RowKernel forward_grad;
  RowKernel terms;  // sums of a divergence's terms from a given record, for a part of a row
  LossTraits traits;
};

// Returns the kernels of a loss, or null if the loss does not take such a target.
using FindKernels = const RowKernels* (*)(LossId loss, Target target, bool f64);

struct InstructionSet {
  const char* name;
  bool (*supported)();
  FindKernels find;
};

extern const InstructionSet kInstructionSets[];  // best first
extern const int kInstructionSetCount;

// Return the one in use.  It is chosen at first use: what FASTDIV_CPU_ISA or ATEN_CPU_CAPABILITY
// names, else the best that is supported.
const InstructionSet& instruction_set();
// Choose by name; return false if the name is unknown or the machine does not support it.
bool set_instruction_set(const char* name);

namespace baseline {
const RowKernels* find_kernels(LossId loss, Target target, bool f64);
}
#if defined(__x86_64__)
namespace avx2 {
const RowKernels* find_kernels(LossId loss, Target target, bool f64);
}
namespace avx512 {
const RowKernels* find_kernels(LossId loss, Target target, bool f64);
}
#endif

}  // namespace fastdiv
