// Finds the kernels of a loss of the registry.
#pragma once

#include "losses/alpha_div.h"
#include "losses/cross_entropy.h"
#include "losses/divergences.h"
#include "losses/entropy.h"
#include "losses/named.h"

namespace fastdiv {

// Return Kernels::of<policy>() for a loss in `real`, or null if it does not take such a target.
template <class real, class Kernels>
auto find_kernels(LossId loss, Target target) -> decltype(Kernels::template of<Entropy<real>>()) {
  switch (loss) {
#define FD_CASE(name, ...) \
  case LossId::k_##name:   \
    return __VA_ARGS__::takes(target) ? Kernels::template of<__VA_ARGS__>() : nullptr;
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
