// The value of a divergence.  Where the moments of the first pass are sound, they give the value.
// Elsewhere a second pass sums the terms, while the row is still in the cache.
// `second_pass(loss, row)` returns the TermSums of a loss.
#pragma once

#include "losses/alpha_div.h"
#include "losses/divergences.h"

namespace fastdiv {

// A divergence as mean + logs.  It is sound if cancellation leaves it six digits.  The log of a sum
// has an absolute error of some ulps of 1, even where it is small.
template <class real>
struct Difference {
  real value;
  bool sound;
};
template <class real>
FD_FN Difference<real> from_moments(real mean, real logs) {
  const real value = mean + logs;
  const real terms = real(1) + abs_of(mean) + abs_of(logs);
  return {value, value > real(0.05) * terms && value <= Limits<real>::highest};
}

// Return 1 where the rows are well separated, else 0.  Above this KL(p || q), the rounding errors
// of the logits are small compared with the difference of the rows.
template <class real>
FD_FN real well_separated(real kl) {
  return kl > real(0.25) && !is_infinite(kl) ? real(1) : real(0);
}

// Return KL(p || q) of two rows of logits, and set row.log_z_ratio.
// Close rows make the moments cancel, so a second pass computes KL around a centre.  Let
// d = log q - log p before normalisation, and c the mean sum p d as the first pass rounded it. With
// the error of the rounding o = sum p (d - c), KL = log(1 + o + sum p (e^(d-c) - 1 - (d - c))) - o.
template <class P, class SecondPass>
FD_FN typename P::real anchor(const RowState<P>& s, typename P::Record& row, SecondPass second_pass,
                              const LossParams& params) {
  using real = typename P::real;
  const real mean = s.sums.a / s.t.sum;  // -c
  row.log_z_ratio = log_of(s.x.sum / s.t.sum);
  const Difference<real> kl = from_moments(mean, row.log_z_ratio);
  if (kl.sound || kl.value != kl.value || is_infinite(kl.value)) return kl.value;
  typename P::Record centred = row;
  centred.log_z_ratio = -mean;
  centred.x_logz -= kl.value;
  const TermSums<real> sum = second_pass(KlDiv<real, P::kTarget>(params), centred);
  const real off = -sum.v / sum.p, share = off / (real(1) + sum.f);
  const real excess = log1p(sum.f) - share * (sum.f + real(0.5) * share);
  row.log_z_ratio = excess + off - mean;
  return excess;
}

// Return the value of a loss of order alpha.  If E is small, it comes from the terms of a second
// pass.  E is small for close rows, and for alpha close to 0 or 1.
template <class P, class SecondPass>
FD_FN typename P::real tilted_value(const P& loss, const RowState<P>& s, typename P::Record& row,
                                    SecondPass second_pass) {
  using real = typename P::real;
  const bool infinite = s.sums.b > real(0);
  const real max = s.tilted.max, log_sum = log_of(s.tilted.sum), tilted = max + log_sum;
  const real logs = loss.tilt(row.x_logz, row.t_logz), less = logs - log_sum;
  const real e = max - less, terms = real(1) + abs_of(tilted) + abs_of(logs);
  const real rounding = rounding_of(max, less) - rounding_of(logs, log_sum);
  const bool sound = infinite || is_infinite(e) || abs_of(e) > real(0.05) * terms;
  const real near =
      sound ? Limits<real>::infinity : log1p(loss.excess(second_pass(loss, row).f, s.mass()));
  return loss.finish(sound ? e : near, sound ? rounding : real(0), near, tilted, infinite, s.mass(),
                     row);
}

// Return the value of a divergence that is a sum of terms, and fill in its record.  `kl` is
// KL(p || q).
template <class P, class SecondPass>
FD_FN typename P::real terms_value(const P& loss, const RowState<P>& s, typename P::Record& row,
                                   SecondPass second_pass, typename P::real kl) {
  using real = typename P::real;
  using Moment = typename P::Moment;
  constexpr bool kLogits = P::kTarget == Target::kLogits;
  // KL(p || q) has u = q - p, and KL(q || p) has v = p - q.  The other is f~ minus that, so the
  // value and sum p give both sums.
  if (P::kMoment == Moment::kForward && !is_infinite(kl)) {
    row.sum_u = kl != kl ? kl : real(1) - s.mass();
    row.sum_v = kl;
    row.use_direct = well_separated(kl);
    return kl;
  }
  if (P::kMoment == Moment::kReverse) {
    const real logs = kLogits ? log_of(s.x.sum / s.t.sum) : row.x_logz;
    const Difference<real> reverse = from_moments(s.sums.b / s.x.sum, -logs);
    if (reverse.sound || (!kLogits && !is_infinite(reverse.value))) {
      row.sum_u = reverse.value;
      row.sum_v = s.mass() - real(1);
      row.use_direct = reverse.sound ? well_separated(kl) : real(0);
      return reverse.value;
    }
  } else {
    row.use_direct = well_separated(loss.kl_fraction() * kl);
  }
  const TermSums<real> sum = second_pass(loss, row);
  row.sum_u = sum.u / sum.q, row.sum_v = kLogits ? sum.v / sum.p : sum.v;
  return sum.f - loss.kappa() * (real(1) - s.mass());
}

// Return the value of any divergence, and fill in its record.
template <class P, class SecondPass>
FD_FN typename P::real divergence_value(const P& loss, const RowState<P>& s,
                                        typename P::Record& row, SecondPass second_pass,
                                        const LossParams& params) {
  typename P::real kl;
  if constexpr (P::kTarget == Target::kLogits)
    kl = anchor(s, row, second_pass, params);
  else
    kl = s.sums.a + mass_times(s.mass(), row.x_logz);
  if constexpr (P::kTilted)
    return tilted_value(loss, s, row, second_pass);
  else
    return terms_value(loss, s, row, second_pass, kl);
}

}  // namespace fastdiv
