// Reduces the registry to few losses, if it is included first: one of each kind that differs in
// what it reads, writes and shares.  The kinds are: a label, class weights, statistics, named
// classes, each type of target, a second pass that is rare and one that is certain.
#pragma once

#include "losses/registry.h"

#undef FD_ROW_LOSSES
#undef FD_DIVERGENCES
#define FD_ROW_LOSSES(X)                                         \
  X(smoothed_cross_entropy, SmoothedCrossEntropy<real>)          \
  X(soft_cross_entropy_stats, WithStats<SoftCrossEntropy<real>>) \
  X(log_prob_and_entropy, LogProbAndEntropy<real>)               \
  X(log_prob, LogProbs<real>)                                    \
  X(topk_log_prob_and_tail, LogProbsAndRest<real>)
#define FD_DIVERGENCES(X) X(kl_div, KlDiv) X(js_div, JsDiv)
