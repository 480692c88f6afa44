// The gradients of one class, from its logit, target and class weight and the record of its row.
#pragma once

#include "losses/divergence.h"

namespace fastdiv {

// Whether masked classes need more than their logits at -inf to get the gradient 0: those of a loss
// with class weights, of softcapped logits, and of a row that holds NaN or nothing.
template <class P, class real>
FD_FN bool masks_gradient(const typename P::Record& row, Outputs<real> g, bool capped) {
  if (P::kWeights || capped) return true;
  const real* const numbers = reinterpret_cast<const real*>(&row);
  real odd = (g.value - g.value) + (g.entropy - g.entropy);
  for (int i = 0; i < kRecordSize; ++i) odd += numbers[i] - numbers[i];
  return odd != real(0);
}

// Return dL/dx without P::grad_label, which the kernels add at the label.  g is the upstream
// gradient times the scale.  PairOf is DirectPair where the record says so, else StablePair; Math
// is for losses of one row.
template <class PairOf, class Math, class P, class real>
FD_FN real grad_of_input(const P& loss, real x, real t, real weight, const typename P::Record& row,
                         Outputs<real> g, real scale) {
  if constexpr (P::kTilted) {
    return g.value * loss.grad_x(log_pair<P::kTarget>(x, t, scale, row), row);
  } else if constexpr (P::kDivergence) {
    const PairOf pair = PairOf::template of<P::kTarget>(x, t, scale, row);
    return g.value * (loss.terms(pair).u - pair.q * row.sum_u);
  } else {
    const real lq = (x - row.x_max) * scale - row.x_logz;
    constexpr real kPerNat = 1 / Math::template kUnit<real>;
    return loss.grad_x(lq, Math::exp(lq * kPerNat), t, weight, row, g);
  }
}

// Return dL/dt.  g is the upstream gradient; only a target of logits has a scale.
template <class PairOf, class P, class real>
FD_FN real grad_of_target(const P& loss, real x, real t, real weight, const typename P::Record& row,
                          real g, real scale) {
  if constexpr (P::kTilted) {
    return g * loss.grad_t(log_pair<P::kTarget>(x, t, scale, row), t, scale, row);
  } else if constexpr (P::kDivergence) {
    const PairOf pair = PairOf::template of<P::kTarget>(x, t, scale, row);
    const real v = loss.terms(pair).v, kappa = loss.kappa();
    if constexpr (P::kTarget == Target::kLogits) return g * scale * (v - pair.p * row.sum_v);
    if constexpr (P::kTarget == Target::kLogProbs) return g * (v + kappa * pair.p);
    return t == real(0) ? real(0) : g * (v / t + kappa);
  } else {
    return loss.grad_t((x - row.x_max) * scale - row.x_logz, weight, g);
  }
}

}  // namespace fastdiv
