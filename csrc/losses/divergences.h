// The divergences, each as its terms f~, u and v (see divergence.h).
#pragma once

#include "losses/divergence.h"

namespace fastdiv {

// KL(p || q): f = p log(p/q), u = q - p.
template <class real, Target target>
struct KlDiv : Divergence<real, target> {
  using Base = Divergence<real, target>;
  using Base::Base;
  static constexpr int kShift = 1;
  static constexpr auto kMoment = Base::Moment::kForward;

  FD_FN Terms<real> terms(const Pair<real>& c) const {
    return {c.top * (c.student_larger() ? c.gap.phi : c.gap.chi), c.q_minus_p(),
            is_infinite(c.y) ? -c.p : -c.p * c.y};
  }
};

// KL(q || p): the same with the rows exchanged.
template <class real, Target target>
struct ReverseKlDiv : Divergence<real, target> {
  using Base = Divergence<real, target>;
  using Base::Base;
  static constexpr int kShift = -1;
  static constexpr int kSums = 2;
  static constexpr auto kMoment = Base::Moment::kReverse;

  FD_FN Sums<real> partial(const Column<real>& c) const {
    return {mass_times(c.et, c.ratio), mass_times(c.ex, -c.ratio)};
  }
  FD_FN Terms<real> terms(const Pair<real>& c) const {
    return {c.top * (c.student_larger() ? c.gap.chi : c.gap.phi),
            is_infinite(c.y) ? -c.q : c.q * c.y, -c.q_minus_p()};
  }
};

// beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.
// With w the share in m of the smaller of p and q, m = top * (1 + w (e^z - 1)).
template <class real, Target target>
struct JsDiv : Divergence<real, target> {
  real beta;
  FD_FN explicit JsDiv(const LossParams& p) : Divergence<real, target>(p), beta(real(p.shape)) {}

  FD_FN Terms<real> terms(const Pair<real>& c) const {
    const bool student = c.student_larger();
    const real w = student ? beta : real(1) - beta;
    const Log1p<real> log_m = log1p_gap(w * c.gap.em1);  // log(m / top)
    const real larger = -log_m.value,
               smaller = c.gap.z - log_m.value;  // log(top / m), log(min / m)
    return {c.top * (w * c.gap.phi - log_m.psi),
            (real(1) - beta) * c.q * (student ? larger : smaller),
            beta * c.p * (student ? smaller : larger)};
  }
};

}  // namespace fastdiv
