// Included before everything else, leaves few kernels: one loss of each kind that differs in what
// it reads, writes and shares.  Those are a label, weights of classes, statistics; k classes of a
// row; a target of each type; a second pass, rare or certain.
#pragma once

#include "losses/registry.h"

#undef FD_ROW_LOSSES
#undef FD_DIVERGENCES
#define FD_ROW_LOSSES(X)                                         \
  X(smoothed_cross_entropy, SmoothedCrossEntropy<real>)          \
  X(soft_cross_entropy_stats, WithStats<SoftCrossEntropy<real>>) \
  X(log_prob_and_entropy, LogProbAndEntropy<real>)               \
  X(topk_kl_div, TopKKlDiv<real>)
#define FD_DIVERGENCES(X) X(kl_div, KlDiv) X(js_div, JsDiv)
