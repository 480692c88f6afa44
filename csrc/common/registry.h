// Which policy a loss is.  A new loss is one line here; every kernel table is made from these.
#pragma once

#include "losses/cross_entropy.h"
#include "losses/divergences.h"
#include "losses/entropy.h"
#include "losses/log_sum_exp.h"

// name, policy of <real>
#define FD_ROW_LOSSES(X)                                                 \
  X(cross_entropy, CrossEntropy<real>)                                   \
  X(cross_entropy_stats, WithStats<CrossEntropy<real>>)                  \
  X(smoothed_cross_entropy, SmoothedCrossEntropy<real>)                  \
  X(smoothed_cross_entropy_stats, WithStats<SmoothedCrossEntropy<real>>) \
  X(soft_cross_entropy, SoftCrossEntropy<real>)                          \
  X(soft_cross_entropy_stats, WithStats<SoftCrossEntropy<real>>)         \
  X(entropy, Entropy<real>)                                              \
  X(log_prob_and_entropy, LogProbAndEntropy<real>)                       \
  X(log_sum_exp_and_sum, LogSumExpAndSum<real>)

// name, policy of <real, target>
#define FD_DIVERGENCES(X)         \
  X(kl_div, KlDiv)                \
  X(reverse_kl_div, ReverseKlDiv) \
  X(js_div, JsDiv)

namespace fastdiv {

enum class LossId : int {
#define FD_ID(name, policy) k_##name,
  FD_ROW_LOSSES(FD_ID) FD_DIVERGENCES(FD_ID)
#undef FD_ID
      kCount
};

constexpr const char* kLossNames[] = {
#define FD_NAME(name, policy) #name,
    FD_ROW_LOSSES(FD_NAME) FD_DIVERGENCES(FD_NAME)
#undef FD_NAME
};

// Kernels::of<policy>() of a loss in `real`; null where the loss does not take such a target.
template <class real, class Kernels>
auto find_kernels(LossId loss, Target target) -> decltype(Kernels::template of<Entropy<real>>()) {
  switch (loss) {
#define FD_CASE(name, ...) \
  case LossId::k_##name:   \
    return target == __VA_ARGS__::kTarget ? Kernels::template of<__VA_ARGS__>() : nullptr;
    FD_ROW_LOSSES(FD_CASE)
#undef FD_CASE
#define FD_CASE(name, policy)                                                                      \
  case LossId::k_##name:                                                                           \
    return target == Target::kLogits     ? Kernels::template of<policy<real, Target::kLogits>>()   \
           : target == Target::kLogProbs ? Kernels::template of<policy<real, Target::kLogProbs>>() \
           : target == Target::kProbs    ? Kernels::template of<policy<real, Target::kProbs>>()    \
                                         : nullptr;
    FD_DIVERGENCES(FD_CASE)
#undef FD_CASE
    default:
      return nullptr;
  }
}

}  // namespace fastdiv
