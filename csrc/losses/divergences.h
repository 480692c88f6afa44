// The divergences, each by its terms f~, u and v (see divergence.h).
#pragma once

#include "losses/divergence.h"

namespace fastdiv {

// KL(p || q): f = p log(p/q), u = q - p.
template <class real, Target target>
struct KlDiv : Divergence<real, target> {
  using Base = Divergence<real, target>;
  using Base::Base;
  static constexpr auto kMoment = Base::Moment::kForward;

  FD_FN real kappa() const { return real(1); }
  FD_FN Terms<real> terms(const StablePair<real>& c) const {
    return {c.larger * (c.q_larger() ? c.gap.phi : c.gap.chi), c.q_minus_p(),
            is_infinite(c.log_ratio) ? -c.p : -c.p * c.log_ratio};
  }
  template <class Math>
  FD_FN Terms<real> terms(const DirectPair<real, Math>& c) const {
    const real u = c.q - c.p, v = mass_times(c.p, -Math::template kUnit<real> * c.log_ratio);
    return {u + v, u, v};
  }
};

// KL(q || p): KL with the rows exchanged.  The sum b is a with the rows exchanged.
template <class real, Target target>
struct ReverseKlDiv : Divergence<real, target> {
  using Base = Divergence<real, target>;
  using Base::Base;
  static constexpr int kSums = 2;
  static constexpr auto kMoment = Base::Moment::kReverse;

  FD_FN real kappa() const { return real(-1); }
  FD_FN Sums<real> partial(const Column<real>& c) const {
    return {mass_times(c.et, c.ratio), mass_times(c.ex, -c.ratio)};
  }
  FD_FN void rebase(Sums<real>& s, Shift<real> dx, Shift<real> dt) const {
    Base::rebase(s, dx, dt);
    s.b = mass_times(dx.ratio, s.b + mass_times(dx.old_sum, dx.delta - dt.delta));
  }
  FD_FN Terms<real> terms(const StablePair<real>& c) const {
    return {c.larger * (c.q_larger() ? c.gap.chi : c.gap.phi),
            is_infinite(c.log_ratio) ? -c.q : c.q * c.log_ratio, -c.q_minus_p()};
  }
  template <class Math>
  FD_FN Terms<real> terms(const DirectPair<real, Math>& c) const {
    const real u = mass_times(c.q, Math::template kUnit<real> * c.log_ratio), v = c.p - c.q;
    return {u + v, u, v};
  }
};

// beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.
// Let w be the weight in m of the smaller of p and q.  Then m = larger * (1 + w (e^z - 1)).
template <class real, Target target>
struct JsDiv : Divergence<real, target> {
  static constexpr bool kTermsAddUp = true;
  real beta, rest;
  FD_FN explicit JsDiv(const LossParams& p)
      : Divergence<real, target>(p), beta(option<real>(p.param)), rest(option<real>(1 - p.param)) {}

  FD_FN real kl_fraction() const { return beta < rest ? beta : rest; }
  FD_FN Terms<real> terms(const StablePair<real>& c) const {
    const bool q_larger = c.q_larger();
    const real w = q_larger ? beta : rest;
    // log(m / larger)
    const Log1p<real> log_m = log1p_gap(w * c.gap.em1, (q_larger ? rest : beta) + w * c.gap.e);
    // log(larger / m) and log(smaller / m)
    const real log_larger = -log_m.value, log_smaller = c.gap.z - log_m.value;
    return {c.larger * (w * c.gap.phi - log_m.psi),
            rest * c.q * (q_larger ? log_larger : log_smaller),
            beta * c.p * (q_larger ? log_smaller : log_larger)};
  }
  template <class Math>
  FD_FN Terms<real> terms(const DirectPair<real, Math>& c) const {
    const real log_m = Math::log(beta * c.p + rest * c.q);
    const real u = rest * Math::template kUnit<real> * mass_times(c.q, c.lq - log_m);
    const real v = beta * Math::template kUnit<real> * mass_times(c.p, c.lp - log_m);
    return {u + v, u, v};
  }
};

// KL(p || m), m = skew p + (1 - skew) q; reversed, p and q are exchanged.
// With r = p/m - 1, f~ = m ((1 + r) log(1 + r) - r).  It is computed from r if p is the smaller,
// else from m/p - 1, so that the argument is in [-1, 0].
template <class real, Target target, bool kReversed>
struct SkewKlDivOf : Divergence<real, target> {
  real skew, rest;
  FD_FN explicit SkewKlDivOf(const LossParams& p)
      : Divergence<real, target>(p), skew(option<real>(p.param)), rest(option<real>(1 - p.param)) {}

  FD_FN real kappa() const { return kReversed ? -rest : rest; }
  FD_FN real kl_fraction() const { return rest; }
  FD_FN Terms<real> terms(const StablePair<real>& c) const {
    const real p = kReversed ? c.q : c.p, log_ratio = kReversed ? -c.log_ratio : c.log_ratio;
    const bool p_smaller = log_ratio > real(0);
    const real offset = rest * c.gap.em1;                                      // -|p - m| / larger
    const real m = p_smaller ? rest + skew * c.gap.e : skew + rest * c.gap.e;  // m / larger
    // m can be 0 only with a skew of 1, where the class adds nothing.
    const real inverse = m > real(0) ? real(1) / m : real(0);
    // log(p / m) if p is the smaller, else log(m / p).
    const Log1p<real> log =
        log1p_gap(p_smaller ? offset * inverse : offset, p_smaller ? c.gap.e * inverse : m);
    const real r = p_smaller ? offset * inverse : -offset * inverse;
    const real f = p_smaller ? m * log.psi : offset * log.value - log.psi;
    const real u = rest * c.larger * (p_smaller ? real(1) : c.gap.e) * -r;
    const real v = mass_times(p, (p_smaller ? log.value : -log.value) - skew * r);
    return {c.larger * f, kReversed ? v : u, kReversed ? u : v};
  }
  template <class Math>
  FD_FN Terms<real> terms(const DirectPair<real, Math>& c) const {
    const real p = kReversed ? c.q : c.p, q = kReversed ? c.p : c.q;
    const real lp = kReversed ? c.lq : c.lp;
    const real m = skew * p + rest * q;
    const real tiny = real(1.2e-38);  // where m is 0, p is 0
    const real share = Math::quotient(p, m > tiny ? m : tiny);
    const real u = rest * q * (real(1) - share);
    const real v = Math::template kUnit<real> * mass_times(p, lp - Math::log(m)) +
                   skew * p * (real(1) - share);
    return {u + v, kReversed ? v : u, kReversed ? u : v};
  }
};
template <class real, Target target>
struct SkewKlDiv : SkewKlDivOf<real, target, false> {
  using SkewKlDivOf<real, target, false>::SkewKlDivOf;
};
template <class real, Target target>
struct ReverseSkewKlDiv : SkewKlDivOf<real, target, true> {
  using SkewKlDivOf<real, target, true>::SkewKlDivOf;
};

// Total variation, |q - p| / 2.
template <class real, Target target>
struct TvDistance : Divergence<real, target> {
  using Divergence<real, target>::Divergence;

  FD_FN Terms<real> terms(const StablePair<real>& c) const {
    const real half = real(0.5);
    const real slope =
        c.log_ratio > real(0) ? half : (c.log_ratio < real(0) ? -half : c.log_ratio);  // NaN stays
    return {-half * c.larger * c.gap.em1, slope * c.q, -slope * c.p};
  }
  template <class Math>
  FD_FN Terms<real> terms(const DirectPair<real, Math>& c) const {
    const real half = real(0.5), slope = c.q > c.p ? half : (c.q < c.p ? -half : real(0));
    return {slope * (c.q - c.p), slope * c.q, -slope * c.p};
  }
};

}  // namespace fastdiv
