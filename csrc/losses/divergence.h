// What the divergences share.  With q = softmax(x) and p from the target, all are D = sum f(q, p)
// with f homogeneous of degree one.  f is used in the form f~ = f + kappa * (q - p), which is zero
// to second order at p = q: its terms are never negative and nothing cancels near zero.  By
// homogeneity f~ = u + v with u = q df~/dq and v = p df~/dp, and the gradients are
//   dD/dx = u - q * sum u,   dD/dt = v - p * sum v,   dD/dlog p = v + kappa * p.
// (Those of order alpha have these terms only next to zero, and are functions of another sum
// elsewhere: see alpha_div.h.)  Of a DirectPair the terms are the textbook's, and f~ = u + v.
#pragma once

#include "losses/loss.h"
#include "losses/pair.h"

namespace fastdiv {

template <class real>
struct Terms {
  real f, u, v;

  FD_FN void add(const Terms& o) { f += o.f, u += o.u, v += o.v; }
};

// What a second pass adds up.  The probabilities too: as they come, from rounded logarithms, they
// add up to 1 only nearly, which the gradients, differences of u and q * sum u, can do without.
template <class real>
struct TermSums {
  real f = 0, u = 0, v = 0, q = 0, p = 0;

  FD_FN void add(const TermSums& o) { f += o.f, u += o.u, v += o.v, q += o.q, p += o.p; }
};

template <class Real, Target target>
struct Divergence : Loss<Real, target> {
  using real = Real;
  using Record = DivergenceRecord<real>;
  using Loss<Real, target>::Loss;

  static constexpr bool kDivergence = true, kDirectTerms = true;
  static constexpr int kSums = 1;
  // The first pass's moment that is the divergence itself: no second pass where it is sound.
  enum class Moment { kNone, kForward, kReverse, kTilted };
  static constexpr Moment kMoment = Moment::kNone;

  FD_FN real kappa() const { return real(0); }
  // About how much the loss is of KL(p || q): little where a mixture is nearly one of the two rows.
  FD_FN real kl_fraction() const { return real(1); }

  // a = sum p~ log(p~/q~), unnormalised, a measure of the distance of the rows.
  FD_FN Sums<real> partial(const Column<real>& c) const {
    return {mass_times(c.et, c.ratio), real(0)};
  }
  FD_FN void rebase(Sums<real>& s, Shift<real> dx, Shift<real> dt) const {
    s.a = mass_times(dt.ratio, s.a + mass_times(dt.old_sum, dt.delta - dx.delta));
  }
};

}  // namespace fastdiv
