// The divergences of order alpha, functions of E = log S with S = sum p^alpha q^(1 - alpha):
//   alpha_div            (S - 1) / (alpha (alpha - 1))
//   renyi_div            E / (alpha - 1)
//   hellinger_distance   (1 + sum p) / 2 - S, of order 1/2
// With the tilted distribution w = p^alpha q^(1 - alpha) / S their gradients are those of E:
//   dE/dx = (1 - alpha) (w - q),   dE/dt = alpha (w - p),   dE/dlog p = alpha w.
// In machine learning w is called the geometric mixture of p and q.
// S is summed as a log-sum-exp of its own, so that it can neither overflow nor vanish.
// For alpha > 1 a class with p > 0 and q = 0 has an infinite term; for alpha < 0 one with q > 0 and
// p = 0.  Infinite terms are counted separately: they make the value infinite, and the gradient is
// that of the other terms.
#pragma once

#include "losses/divergence.h"

namespace fastdiv {

// The record leaves infinite terms out.
template <class real, Target target>
struct AlphaDiv : Divergence<real, target> {
  using Base = Divergence<real, target>;
  using Record = AlphaRecord<real>;
  static constexpr bool kTilted = true, kDirectTerms = false;
  static constexpr int kSums = 2;  // b counts the infinite terms
  static constexpr auto kMoment = Base::Moment::kTilted;

  real alpha, rest;    // rest = 1 - alpha
  real linear, power;  // value = linear E + power (e^E - 1) + mass (sum p - 1)
  real mass;
  FD_FN explicit AlphaDiv(const LossParams& p) : Base(p), linear(0), power(0), mass(0) {
    const bool hellinger = p.loss == LossId::k_hellinger_distance;
    const double order = hellinger ? 0.5 : p.param;
    alpha = option<real>(order), rest = option<real>(1 - order);
    if (p.loss == LossId::k_alpha_div) power = real(-1 / (order * (1 - order)));
    if (p.loss == LossId::k_renyi_div) linear = real(-1 / (1 - order));
    if (hellinger) power = real(-1), mass = real(0.5);
  }

  // Return log(p^alpha q^(1 - alpha)).  If p and q are 0, the result is not finite.
  FD_FN real tilt(real lx, real lt) const { return alpha * lt + rest * lx; }

  // Return S - 1 from the sum of the terms f~ of order alpha.
  FD_FN real excess(real terms, real sum_p) const {
    return alpha * (sum_p - real(1)) - alpha * rest * terms;
  }
  // `rounding` is the rounding error of e = E, which e^E would magnify.
  FD_FN real finish(real e, real rounding, real near, real tilted, bool infinite, real sum_p,
                    Record& row) const {
    const bool nothing = e == -Limits<real>::infinity;  // no class has mass on both sides
    const real s = exp(e), more = is_infinite(s) ? real(0) : s * rounding;
    row.small_log_s = near;
    row.slope = nothing ? real(0) : linear + mass_times(power, s + more);
    row.tilted_logz = nothing ? real(0) : tilted;
    if (infinite) return Limits<real>::infinity;
    return mass_times(linear, e) + mass_times(power, expm1(e) + more) +
           mass_times(mass, sum_p - real(1));
  }

  FD_FN real grad_x(const LogPair<real>& c, const Record& row) const {
    const real lw = log_w(c, row);
    return mass_times(less(lw, c.lq, -alpha * c.log_ratio - row.small_log_s, row),
                      row.slope * rest);
  }
  FD_FN real grad_t(const LogPair<real>& c, real t, real scale, const Record& row) const {
    const real lw = log_w(c, row), slope = row.slope * alpha;
    if constexpr (target == Target::kLogits)
      return mass_times(less(lw, c.lp, rest * c.log_ratio - row.small_log_s, row), slope * scale);
    if constexpr (target == Target::kLogProbs)
      return mass_times(exp_neg(lw), slope) + mass * exp_neg(t);
    // w / p is largest where p is small, and there log p is least accurate.  So log p is multiplied
    // by the smaller of alpha and alpha - 1, and a factor corrects the rounding.
    const real half = real(0.5), most = Limits<real>::log_largest;
    const real log_w_over_p = rest * (c.lx - c.lt) - row.tilted_logz;
    const real power_of_p = alpha < half ? lw : (log_w_over_p > most ? most : log_w_over_p);
    const real v = exp_neg(is_infinite(lw) ? lw : power_of_p);
    const real ratio = alpha < half ? v / t : v + v * rest * rounding_of(c.lx, c.lt);
    return t == real(0) ? real(0) : mass_times(ratio, slope) + mass;
  }

  // f~ = (p^alpha q^(1-alpha) - alpha p - (1-alpha) q) / (alpha (alpha - 1)).  It is accurate for
  // alpha close to 0 and 1, and for p close to q.  Let z <= 0 be the log of the smaller of p and q
  // minus that of the larger; k = alpha if p is the smaller, else 1 - alpha.  Then f~ / larger is
  //   (chi(z) - chi(k z) / k) / (1 - k)   or   (phi(z) + e^z chi(c z) / c) / k,  c = k - 1.
  // Each of the two cancels for some k.  For a positive argument, chi(-a) = e^-a phi(a).
  FD_FN Terms<real> terms(const StablePair<real>& pair) const {
    // The mixture of two masses that are 0 or subnormal may be a normal number.
    const real log_larger = pair.lq > pair.lp ? pair.lq : pair.lp;
    const real tiny = log_larger > -Limits<real>::infinity ? pair.lq - pair.lp : pair.log_ratio;
    const real log_ratio = pair.larger == real(0) ? tiny : pair.log_ratio;
    const real z = log_ratio > real(0) ? -log_ratio : log_ratio;
    const real k = log_ratio > real(0) ? alpha : rest;
    const real other = log_ratio > real(0) ? rest : alpha;  // 1 - k
    const bool by_phi = k >= real(0.5) && k < real(2);
    const real c = by_phi ? -other : k;
    const ExpGap<real> g = exp_gap(z), h = exp_gap(abs_of(c) * z);
    const real mixed = mass_times(h.phi, exp_neg(tilt(pair.lq, pair.lp)));
    const real chi = c < real(0) ? mixed : (by_phi ? pair.larger * g.e : pair.larger) * h.chi;
    // Far from 0, chi grows like its argument and its parts cancel; those of e^z - 1 do not.
    const bool far = z < real(-2) && c > real(0) && !by_phi;
    const real f = by_phi ? (pair.larger * g.phi + chi / c) / k
                   : far  ? pair.larger * (g.em1 - h.em1 / c) / other
                          : (pair.larger * g.chi - chi / c) / other;
    return {f, real(0), real(0)};
  }

 private:
  // Return log w; -inf for a class without mass and for one whose term is infinite.
  FD_FN real log_w(const LogPair<real>& c, const Record& row) const {
    const real inf = Limits<real>::infinity, v = tilt(c.lx, c.lt);
    const real finite = v == inf ? -inf : v - row.tilted_logz;
    return (c.lx > c.lt ? c.lx : c.lt) == -inf ? -inf : finite;
  }
  // Return w - o for o = q or p, from the logs.  `near` is log w - log o, accurate to the last
  // digit where the rows are close.
  FD_FN real less(real lw, real lo, real near, const Record& row) const {
    const real direct = is_infinite(row.small_log_s) ? lw - lo : near;
    const real ratio = is_infinite(lw) ? lw : direct;
    const bool w_larger = ratio > real(0);
    const real em1 = exp_gap(w_larger ? -ratio : ratio).em1;
    return mass_times(exp_neg(w_larger ? lw : lo), w_larger ? -em1 : em1);
  }
};

}  // namespace fastdiv
