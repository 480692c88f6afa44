// The kernel tables of the instruction sets, and the choice among them.
#pragma once

#include "losses/registry.h"
#include "losses/row_args.h"

namespace fastdiv {

using RowKernel = void (*)(const RowArgs& args, int64_t begin, int64_t end);

// The skeletons, over rows [begin, end).
struct RowKernels {
  RowKernel forward;       // value and record
  RowKernel backward;      // gradients from the record
  RowKernel forward_grad;  // both, while the row is in the cache
  // These two are null for a loss with statistics: its gradients are those of the plain one.
  RowKernel terms;  // sums of a divergence's terms from a given record, of what is part of a row
  LossTraits traits;
};

// Kernels of a loss; null where the loss does not take such a target.
using FindKernels = const RowKernels* (*)(LossId loss, Target target, bool f64);

struct InstructionSet {
  const char* name;
  bool (*supported)();
  FindKernels find;
};

extern const InstructionSet kInstructionSets[];  // best first
extern const int kInstructionSetCount;

// Chosen at first use: the best supported, or what FASTDIV_CPU_ISA or ATEN_CPU_CAPABILITY names.
const InstructionSet& instruction_set();
// False, and nothing changes, where the name is unknown or the machine lacks it.
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

// Asks for huge pages under memory that is about to be written for the first time.
void advise_huge_pages(void* data, int64_t bytes);

}  // namespace fastdiv
