// What every private op takes besides its tensors.
#pragma once

#include "losses/row_args.h"

// What every op takes after its tensors.  `batch` is what reduction "batchmean" divides by.
#define FD_OPTIONS_SCHEMA                                                                   \
  "int loss, int target_type, int reduction, SymInt batch, int ignore_index, float scale, " \
  "float softcap, float param, float confidence, float smoothing_per_class, float z_loss"
#define FD_ROWS_SCHEMA "Tensor? t, Tensor? labels, Tensor? class_weight, Tensor? row_weight, "

namespace fastdiv {

enum class Reduction : int { kNone = 0, kSum = 1, kMean = 2, kBatchMean = 3 };

// The options as they come, and what the kernels make of them.
struct Options {
  LossId loss;
  Target target;
  Reduction reduction;
  int64_t batch, ignore_index;
  double scale, softcap;
  LossParams params;

  Options(int64_t loss, int64_t target, int64_t reduction, int64_t batch, int64_t ignore_index,
          double scale, double softcap, double param, double confidence, double smoothing_per_class,
          double z_loss)
      : loss(LossId(loss)),
        target(Target(target)),
        reduction(Reduction(reduction)),
        batch(batch),
        ignore_index(ignore_index),
        scale(scale),
        softcap(softcap),
        params{LossId(loss), param, confidence, smoothing_per_class, z_loss, Target(target)} {}
};

}  // namespace fastdiv
