// What the divergences share.  With q = softmax(x) and p from the target, all are D = sum f(q, p)
// with f homogeneous of degree one.  f is used in the form f~ = f + shift * (q - p), which is zero
// to second order at p = q: its terms are never negative and nothing cancels near zero.  By
// homogeneity f~ = u + v with u = q df~/dq and v = p df~/dp, and the gradients are
//   dD/dx = u - q * sum u,   dD/dt = v - p * sum v,   dD/dlog p = v + shift * p.
#pragma once

#include "losses/loss.h"

namespace fastdiv {

template <class real>
struct Terms {
  real f, u, v;

  FD_FN void add(const Terms& o) { f += o.f, u += o.u, v += o.v; }
};

// One class seen from both rows.
template <class real>
struct Pair {
  real y;            // log q - log p
  real q, p, top;    // top = max(p, q)
  ExpGap<real> gap;  // of z = -|y|: min(p, q) = top * gap.e

  FD_FN bool student_larger() const { return y > real(0); }
  FD_FN real q_minus_p() const { return student_larger() ? -top * gap.em1 : top * gap.em1; }
};

template <Target kTarget, class real>
FD_FN Pair<real> make_pair(real x, real t, real scale, const Row<real>& row) {
  const real lq = (x - row.x_max) * scale - row.x_logz;
  const real lp = log_target<kTarget>(t, row.t_max, row.t_logz, scale);
  Pair<real> c;
  c.y = kTarget == Target::kLogits
            ? difference_of_differences(x, t, row.x_max, row.t_max) * scale - row.gap
            : lq - lp;
  c.top = exp_neg(lq > lp ? lq : lp);
  if constexpr (kTarget == Target::kProbs) c.top = c.y > real(0) ? c.top : t;
  // A class without mass on either side (-inf less -inf) adds nothing; other NaNs stay.
  c.y = c.top == real(0) ? real(0) : c.y;
  c.gap = exp_gap(c.y > real(0) ? -c.y : c.y);
  const real smaller = c.top * c.gap.e;
  c.q = c.student_larger() ? c.top : smaller;
  // A given probability is itself: the one found from its logarithm lacks the last digits.
  c.p = kTarget == Target::kProbs ? t : (c.student_larger() ? smaller : c.top);
  return c;
}

template <class Real, Target target>
struct Divergence : Loss<Real, target> {
  using real = Real;
  using Loss<Real, target>::Loss;

  static constexpr bool kDivergence = true;
  static constexpr int kSums = 1;
  static constexpr int kShift = 0;
  // The first sweep's moment that is the divergence itself: no second sweep where it is sound.
  enum class Moment { kNone, kForward, kReverse };
  static constexpr Moment kMoment = Moment::kNone;

  // a = sum p~ log(p~/q~), b = sum q~ log(q~/p~), both unnormalised.  For logits a also anchors
  // log q - log p where the rows are close.
  FD_FN Sums<real> partial(const Column<real>& c) const {
    return {mass_times(c.et, c.ratio), real(0)};
  }
  FD_FN void rebase(Sums<real>& s, Shift<real> dx, Shift<real> dt) const {
    const real delta = dt.delta - dx.delta;
    s.a = mass_times(dt.ratio, s.a + mass_times(dt.old_sum, delta));
    s.b = mass_times(dx.ratio, s.b + mass_times(dx.old_sum, -delta));
  }
};

}  // namespace fastdiv
