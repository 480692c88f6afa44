// The options of a loss that are not tensors.
#pragma once

#include "losses/row_args.h"
#include "ops/stack.h"

namespace fastdiv {

enum class Reduction : int { kNone = 0, kSum = 1, kMean = 2, kBatchMean = 3 };

struct Options {
  LossId loss;
  Target target;
  Reduction reduction;
  int64_t batch;  // what kBatchMean divides by
  int64_t ignore_index, first_class;
  bool by_probability;
  double scale, softcap;
  LossParams params;

  // The order of the options, here and in the constructor.
  static constexpr const char* kSchema =
      "int loss, int target_type, int reduction, SymInt batch, int ignore_index, "
      "int first_class, bool by_probability, float scale, float softcap, float param, "
      "float confidence, float smoothing_per_class, float z_loss";

  explicit Options(Stack& s)
      : loss(LossId(s.take<int64_t>())),
        target(Target(s.take<int64_t>())),
        reduction(Reduction(s.take<int64_t>())),
        batch(s.take<int64_t>()),
        ignore_index(s.take<int64_t>()),
        first_class(s.take<int64_t>()),
        by_probability(s.take<bool>()),
        scale(s.take<double>()),
        softcap(s.take<double>()),
        params{loss,
               s.take<double>(),  // param
               s.take<double>(),  // confidence
               s.take<double>(),  // smoothing_per_class
               s.take<double>(),  // z_loss
               by_probability,
               target} {}
};

}  // namespace fastdiv
