// Reduces the kernels to those of four losses of logits, if it is included first.  The losses keep
// their numbers.  Targets that are probabilities would be taken for logits.
#pragma once

#include "losses/divergences.h"
#include "losses/registry.h"

namespace fastdiv {

template <class real, Target target>
using KlDivOfLogits = KlDiv<real, Target::kLogits>;
template <class real, Target target>
using JsDivOfLogits = JsDiv<real, Target::kLogits>;

}  // namespace fastdiv

#undef FD_ROW_LOSSES
#undef FD_DIVERGENCES
#define FD_ROW_LOSSES(X) X(cross_entropy, CrossEntropy<real>) X(entropy, Entropy<real>)
#define FD_DIVERGENCES(X) X(kl_div, KlDivOfLogits) X(js_div, JsDivOfLogits)
