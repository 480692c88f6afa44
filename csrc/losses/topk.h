// KL(p || q) from a teacher p that is known at k classes (topk_kl_div).
//
// Why the gradient is what it is: KL = sum_c p_c log p_c - sum_c p_c log q_c, and a scaled logit
// moves every log q by d log q_c / d x_j = [c = j] - q_j.  So d KL / d x_j = mass q_j - p_j, with
// mass = sum_c p_c, which need not be 1: missing="ignore" leaves the rest out.
// A class that is not among the k has p = mass_per_other, which is 0 unless missing="uniform".
// That option spreads the rest, max(0, 1 - sum of the k), evenly over the other classes.
#pragma once

#include "losses/divergence.h"

namespace fastdiv {

// For logits log p = (v - t_max) * scale - t_logz, for log-probabilities the same without the
// scale. For probabilities p = v / topk_mass.
template <class real>
struct TopKKlDiv : Loss<real> {
  using Record = TopKRecord<real>;
  static constexpr bool kTopK = true;
  static constexpr bool takes(Target target) { return target != Target::kNone; }

  const Target target;
  const bool normalised;  // p adds up to 1 over the k
  const bool uniform;     // the other classes share 1 - sum p evenly

  FD_FN explicit TopKKlDiv(const LossParams& p)
      : Loss<real>(p),
        target(p.target),
        normalised(target == Target::kLogits || p.loss == LossId::k_renormalized_topk_kl_div),
        uniform(!normalised && p.loss == LossId::k_uniform_topk_kl_div) {}

  // For a class that is not among the k.  The caller has put the scale into g.
  FD_FN real grad_x(real, real q, real, real, const Record& row, Outputs<real> g) const {
    return g.value * (q * row.mass - row.mass_per_other);
  }
};

// The formulas for one of the k classes, with logit x and value v.
template <Target kTarget, class real>
struct TopKClass {
  TopKRecord<real> row;
  real scale;

  FD_FN real log_q(real x) const { return (x - row.x_max) * scale - row.x_logz; }
  FD_FN real p(real v) const {
    return kTarget == Target::kProbs ? v / row.topk_mass : exp_neg(log_value(v) - row.t_logz);
  }
  // Return a value that is a log, minus the maximum if it is a logit.
  FD_FN real log_value(real v) const {
    return (v - row.t_max) * (kTarget == Target::kLogits ? scale : real(1));
  }
  FD_FN real log_p_over_q(real x, real v) const {
    const real lp = kTarget == Target::kProbs ? log_of(p(v)) : log_value(v) - row.t_logz;
    return lp - log_q(x);
  }
  // Return df/dp of f = p log(p / q).  In an infinite term p is a constant.
  FD_FN real slope(real x, real v) const {
    return is_infinite(log_q(x)) ? real(0) : log_p_over_q(x, v) + real(1);
  }

  FD_FN Terms<real> operator()(real x, real v) const {
    const real mass = p(v);
    return {mass_times(mass, log_p_over_q(x, v)), -mass, mass_times(mass, slope(x, v))};
  }
  FD_FN real grad_x(real x, real v, real g) const {
    return g * scale * (exp_neg(log_q(x)) * row.mass - p(v));
  }
  // A larger p may take mass from other classes; row.common_slope is the derivative by that mass.
  FD_FN real grad_value(real x, real v, real g) const {
    const real over_common = slope(x, v) - row.common_slope;
    if constexpr (kTarget == Target::kProbs)
      return v == real(0) ? real(0) : g * over_common / row.topk_mass;
    return g * (kTarget == Target::kLogits ? scale : real(1)) * mass_times(p(v), over_common);
  }
};

// Call body(TopKClass) with the kind of the values as a template argument.
template <class real, class Body>
FD_FN void with_topk_class(Target target, const TopKRecord<real>& row, real scale, Body body) {
  if (target == Target::kLogits)
    body(TopKClass<Target::kLogits, real>{row, scale});
  else if (target == Target::kLogProbs)
    body(TopKClass<Target::kLogProbs, real>{row, scale});
  else
    body(TopKClass<Target::kProbs, real>{row, scale});
}

// Sums over the k classes.  The mass is in double, because 1 - mass counts too.
template <class real>
struct TopKSums {
  real f = 0, v = 0;
  double mass = 0;

  FD_FN void add(const TopKSums& o) { f += o.f, v += o.v, mass += o.mass; }
};

// The probability of a value before it is divided by the sum of all k, as a term: u = -p.
template <Target kTarget, class real>
struct TopKMass {
  TopKClass<kTarget, real> of;
  FD_FN Terms<real> operator()(real, real v) const { return {0, -of.p(v), 0}; }
};

// The sum of the finite logits.  It is in double, because the sum over few others is the difference
// of the sum over all and that over the k.
struct FiniteSum {
  double sum = 0, count = 0;

  FD_FN void add(const FiniteSum& o) { sum += o.sum, count += o.count; }
};

// Return the value, and fill in the record.  `topk` sums over the k classes and over all logits.
template <Target kTarget, class real, class Classes>
FD_FN real topk_value(const TopKKlDiv<real>& loss, TopKClass<kTarget, real> one,
                      TopKRecord<real>& row, const Classes& topk, int64_t others) {
  one.row.topk_mass = 1;
  if (loss.normalised) {
    if constexpr (kTarget != Target::kProbs) one.row.t_max = topk.largest_value();
    const real mass = real(topk.sum(TopKMass<kTarget, real>{one}).mass);
    if constexpr (kTarget == Target::kProbs)
      one.row.topk_mass = mass;
    else
      one.row.t_logz = log_of(mass);
  }
  row = one.row;
  const TopKSums<real> sum = topk.sum(one);
  row.mass = real(sum.mass), row.mass_per_other = 0,
  row.common_slope = loss.normalised ? sum.v : real(0);
  if (!loss.uniform || others == 0) return sum.f;
  const real less = real(1 - sum.mass), rest = less < real(0) ? real(0) : less;
  const FiniteSum all = topk.sum_of_all_logits(), of_k = topk.sum_of_logits();
  const bool finite = all.count - of_k.count == double(others);
  const real mean = real((all.sum - of_k.sum) / double(others) - double(row.x_max));
  const real log_q = finite ? mean * one.scale - row.x_logz : -Limits<real>::infinity;
  const real ratio = log_of(rest) - log_of(real(others)) - log_q;
  row.mass += rest, row.mass_per_other = rest / real(others);
  row.common_slope = rest == real(0) || !finite ? real(0) : ratio + real(1);
  return sum.f + mass_times(rest, ratio);
}

}  // namespace fastdiv
