// Runs every kernel without torch, on buffers of exactly the right size, and compares with plain
// loops in double.  The kernels are those of the CPU or, with FD_CUDA_ON_CPU, those of CUDA.  Built
// and run by test_sanitizers.py and test_cuda_kernels.py.
//
// The argument is a dtype (f32, f64, f16, bf16; default: all), or "shared": then only rows that
// threads share are computed, for ThreadSanitizer, and nothing is compared with plain loops.
#include "problem.h"

using namespace fastdiv;

int main(int argc, char** argv) {
  const std::string only = argc > 1 ? argv[1] : "";
  const bool compare = only != "shared";
  const std::string names[] = {"f32", "f64", "f16", "bf16"};
  Report report;
  const auto run = [&](LossId loss, Target target, DType dtype, int64_t classes, Setup setup,
                       bool split) {
    const auto* kernels = find(loss, target, dtype);
    if (!kernels) return;
    Problem problem(*kernels, loss, target, dtype, classes, setup, split, compare ? 5 : 2, report);
    problem.run();
    problem.check_forward_grad();
    problem.check_in_place();
    if (compare) problem.check_against_plain_loops();
  };
  for (int i = 0; i < int(LossId::kCount); ++i)
    for (Target target : {Target::kNone, Target::kLogits, Target::kLogProbs, Target::kProbs})
      for (DType dtype : {DType::kF32, DType::kF64, DType::kF16, DType::kBF16}) {
        // What threads share is the same for all dtypes.
        if (!only.empty() && names[size_t(dtype)] != (compare ? only : "f32")) continue;
        const LossId loss = LossId(i);
        // On a CPU the kernels of float also compute halves, which they read a tile at a time.
        const bool own = !kSplits || size_of(dtype) > 2;
        for (int64_t classes : kShared)
          if ((kSplits && own) || !compare) run(loss, target, dtype, classes, {}, true);
        if (!compare) continue;
        for (int64_t classes : kClasses)
          if (own || classes < 8193) run(loss, target, dtype, classes, {}, false);
        run(loss, target, dtype, 513, {0.5, 30, true, 3}, false);
        run(loss, target, dtype, 8197, {0.5, 30, true, 1}, true);
        run(loss, target, dtype, 513, {0.5, 30, true, 3, Masks::kBits, true}, false);
        run(loss, target, dtype, 1029, {0.5, 0, false, 1, Masks::kBytes, true}, true);
      }
  std::printf("%d checks, %d failures\n", report.checks, report.failures);
  return report.failures ? 1 : 0;
}
