// The losses and their policies.  All kernel tables are made from these lists; a new loss adds one
// line.  A policy that several losses share reads LossParams::loss to tell them apart.
#pragma once

// Name, policy.
#define FD_ROW_LOSSES(X)                                                 \
  X(cross_entropy, CrossEntropy<real>)                                   \
  X(cross_entropy_stats, WithStats<CrossEntropy<real>>)                  \
  X(smoothed_cross_entropy, SmoothedCrossEntropy<real>)                  \
  X(smoothed_cross_entropy_stats, WithStats<SmoothedCrossEntropy<real>>) \
  X(soft_cross_entropy, SoftCrossEntropy<real>)                          \
  X(soft_cross_entropy_stats, WithStats<SoftCrossEntropy<real>>)         \
  X(entropy, Entropy<real>)                                              \
  X(log_prob_and_entropy, LogProbAndEntropy<real>)                       \
  X(log_prob, LogProbs<real>)                                            \
  X(topk_log_prob, LogProbs<real>)                                       \
  X(topk_log_prob_and_tail, LogProbsAndRest<real>)                       \
  X(topk_log_prob_and_mean, LogProbsAndRest<real>)

// Name, policy with template arguments <real, target>.
#define FD_DIVERGENCES(X)                  \
  X(kl_div, KlDiv)                         \
  X(reverse_kl_div, ReverseKlDiv)          \
  X(js_div, JsDiv)                         \
  X(skew_kl_div, SkewKlDiv)                \
  X(reverse_skew_kl_div, ReverseSkewKlDiv) \
  X(alpha_div, AlphaDiv)                   \
  X(renyi_div, AlphaDiv)                   \
  X(tv_distance, TvDistance)               \
  X(hellinger_distance, AlphaDiv)

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

}  // namespace fastdiv
