// The probabilities of one class in both rows.
#pragma once

#include "losses/record.h"

namespace fastdiv {

template <class real>
struct LogPair {
  real lx, lt;  // before normalisation
  real lq, lp;
  real log_ratio;  // log q - log p; NaN if the class has no mass on either side
};

template <Target kTarget, class real>
FD_FN LogPair<real> log_pair(real x, real t, real scale, const PairRecord<real>& row) {
  const real lx = (x - row.x_max) * scale, lq = lx - row.x_logz;
  const real lt = log_target<kTarget>(t, row.t_max, real(0), scale), lp = lt - row.t_logz;
  const real log_ratio =
      kTarget == Target::kLogits
          ? difference_of_differences(x, t, row.x_max, row.t_max) * scale - row.log_z_ratio
          : lq - lp;
  return {lx, lt, lq, lp, log_ratio};
}

// For rows that may be close.  Everything is computed from the log ratio, and nothing cancels.
template <class real>
struct StablePair {
  real lq, lp, log_ratio;  // as above, but the log ratio is 0 where there is no mass
  real q, p, larger;       // larger = max(p, q)
  ExpGap<real> gap;        // for z = -|log_ratio|: min(p, q) = larger * gap.e

  FD_FN bool q_larger() const { return log_ratio > real(0); }
  FD_FN real q_minus_p() const { return q_larger() ? -larger * gap.em1 : larger * gap.em1; }

  template <Target kTarget>
  static FD_FN StablePair of(real x, real t, real scale, const PairRecord<real>& row) {
    const LogPair<real> logs = log_pair<kTarget>(x, t, scale, row);
    StablePair c;
    c.lq = logs.lq, c.lp = logs.lp;
    // A class without mass on either side (-inf minus -inf) adds nothing; other NaNs stay.  We test
    // the logs, because a test of the masses would make one exponential wait for the other.
    const real log_larger = c.lq > c.lp ? c.lq : c.lp;
    const real most = kTarget == Target::kProbs && t > real(0) ? real(0) : log_larger;
    c.log_ratio = most < Limits<real>::log_smallest ? real(0) : logs.log_ratio;
    c.larger = exp_neg(log_larger);
    if constexpr (kTarget == Target::kProbs) c.larger = c.q_larger() ? c.larger : t;
    c.gap = exp_gap(c.log_ratio > real(0) ? -c.log_ratio : c.log_ratio);
    const real smaller = c.larger * c.gap.e;
    c.q = c.q_larger() ? c.larger : smaller;
    // A given probability is used as it is: one computed from its log lacks the last digits.
    c.p = kTarget == Target::kProbs ? t : (c.q_larger() ? smaller : c.larger);
    return c;
  }
};

// For well-separated rows, where it is accurate enough at half the cost.  lq or lp is -inf for a
// class without mass, so multiply with mass_times.  Logs are in units of Math::kUnit.
template <class real, class Math>
struct DirectPair {
  real lq, lp, log_ratio, q, p;

  template <Target kTarget>
  static FD_FN DirectPair of(real x, real t, real scale, const Row<real>& row) {
    const real lq = log_q(x, scale, row), lp = log_p<kTarget>(t, scale, row);
    return {lq, lp, lq - lp, Math::exp(lq), kTarget == Target::kProbs ? t : Math::exp(lp)};
  }
  // The same with masses that are known.
  template <Target kTarget>
  static FD_FN DirectPair of_masses(real q, real p, real x, real t, real scale,
                                    const Row<real>& row) {
    const real lq = log_q(x, scale, row), lp = log_p<kTarget>(t, scale, row);
    return {lq, lp, lq - lp, q, p};
  }

 private:
  static constexpr real kPerNat = 1 / Math::template kUnit<real>;

  static FD_FN real log_q(real x, real scale, const Row<real>& row) {
    return (x - row.x_max) * (scale * kPerNat) - row.x_logz * kPerNat;
  }
  template <Target kTarget>
  static FD_FN real log_p(real t, real scale, const Row<real>& row) {
    if constexpr (kTarget == Target::kLogits)
      return (t - row.t_max) * (scale * kPerNat) - row.t_logz * kPerNat;
    return log_target<kTarget>(t, row.t_max, row.t_logz, scale) * kPerNat;
  }
};

}  // namespace fastdiv
