// What the divergences share.  With q = softmax(x) and p from the target, all are D = sum f(q, p)
// with f convex and homogeneous of degree one.  f is used in the form f~ = f + kappa (q - p).  At
// p = q, f~ and its first derivatives are 0, so no term is negative and nothing cancels near zero.
// By homogeneity f~ = u + v with u = q df~/dq and v = p df~/dp, and the gradients are
//   dD/dx = u - q sum u,   dD/dt = v - p sum v,   dD/dlog p = v + kappa p.
// From a DirectPair u and v come by the textbook formulas, and f~ as their sum.
// The divergences of order alpha use these terms only near zero: see alpha_div.h.
#pragma once

#include "losses/loss.h"
#include "losses/pair.h"

namespace fastdiv {

template <class real>
struct Terms {
  real f, u, v;
};

// Sums over a row in the second pass.  q and p come from rounded logs, so they add up to 1 only
// within 3e-7.  The gradient u - q sum u would carry that error.  So sum u is divided by the actual
// sum of q, and sum v by that of p.
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
  // Which moment of the first pass gives the divergence.  If it is sound, no second pass runs.
  enum class Moment { kNone, kForward, kReverse, kTilted };
  static constexpr Moment kMoment = Moment::kNone;
  // Whether sum u and sum v of well-separated rows cannot cancel, so that they give sum f~.
  static constexpr bool kTermsAddUp = false;

  FD_FN real kappa() const { return real(0); }
  // Return the approximate ratio of the loss to KL(p || q).  It is small if the mixture is almost
  // one of the two rows.
  FD_FN real kl_fraction() const { return real(1); }

  // a = sum p log(p/q) before normalisation.  It tells whether the rows are well separated.
  FD_FN Sums<real> partial(const Column<real>& c) const {
    return {mass_times(c.et, c.ratio), real(0)};
  }
  FD_FN void rebase(Sums<real>& s, Shift<real> dx, Shift<real> dt) const {
    s.a = mass_times(dt.ratio, s.a + mass_times(dt.old_sum, dt.delta - dx.delta));
  }
};

}  // namespace fastdiv
