// The divergence of two rows: what the moments of the first pass give where they are sound, else a
// second pass over the row, which is still near.  `second_pass(loss, row)` returns the TermSums of
// a loss.
#pragma once

#include "losses/alpha_div.h"
#include "losses/divergences.h"

namespace fastdiv {

// A divergence from the logs of sums and a mean, and whether cancellation leaves it six digits: the
// logs of sums are uncertain by some ulps of 1, however small they are.
template <class real>
struct Difference {
  real value;
  bool sound;
};
template <class real>
FD_FN Difference<real> sum_of(real mean, real logs) {
  const real value = mean + logs;
  const real terms = real(1) + abs_of(mean) + abs_of(logs);
  return {value, value > real(0.05) * terms && value <= Limits<real>::highest};
}

// Return 1 where the rows are well separated, else 0.  From this KL(p || q) on, rounding errors of
// the logits are small beside the difference of the rows.
template <class real>
FD_FN real well_separated(real kl) {
  return kl > real(0.25) && !is_infinite(kl) ? real(1) : real(0);
}

// KL(p || q) of two rows of logits, and row.gap.  Where the rows are so close that the moments
// cancel, with d = log q~ - log p~, c about sum p d, and o = sum p (d - c), which the first pass's
// rounding has left off: KL = log(1 + o + sum p (e^(d-c) - 1 - (d - c))) - o.
template <class P, class real, class SecondPass>
FD_FN real anchor(const RowState<P>& s, Row<real>& row, SecondPass second_pass,
                  const LossParams& params) {
  const real mean = s.sums.a / s.t.sum;  // -c
  row.gap = log_of(s.x.sum / s.t.sum);
  const Difference<real> kl = sum_of(mean, row.gap);
  if (kl.sound || kl.value != kl.value || is_infinite(kl.value)) return kl.value;
  Row<real> centred = row;
  centred.gap = -mean;
  centred.x_logz -= kl.value;
  const TermSums<real> sum = second_pass(KlDiv<real, P::kTarget>(params), centred);
  const real off = -sum.v / sum.p, share = off / (real(1) + sum.f);
  const real excess = log1p(sum.f) - share * (sum.f + real(0.5) * share);
  row.gap = excess + off - mean;
  return excess;
}

// The value of a loss of order alpha.  Where E is small, of rows that are close or of an order
// close to 0 or 1, it comes from the terms of a second pass.
template <class P, class real, class SecondPass>
FD_FN real tilted_value(const P& loss, const RowState<P>& s, Row<real>& row,
                        SecondPass second_pass) {
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

// The value, and the row's a, b and c for the backward.
template <class P, class real, class SecondPass>
FD_FN real divergence_value(const P& loss, const RowState<P>& s, Row<real>& row,
                            SecondPass second_pass, const LossParams& params) {
  using Moment = typename P::Moment;
  constexpr bool kLogits = P::kTarget == Target::kLogits;
  real kl;
  if constexpr (kLogits)
    kl = anchor(s, row, second_pass, params);
  else
    kl = s.sums.a + mass_times(s.mass(), row.x_logz);
  if constexpr (P::kTilted) return tilted_value(loss, s, row, second_pass);
  // u + v = f~ and one of them is q - p or its negative, so the value gives both sums.
  if (P::kMoment == Moment::kForward && !is_infinite(kl)) {
    row.a = kl != kl ? kl : real(1) - s.mass();
    row.b = kl;
    row.c = well_separated(kl);
    return kl;
  }
  if (P::kMoment == Moment::kReverse) {
    const real logs = kLogits ? log_of(s.x.sum / s.t.sum) : row.x_logz;
    const Difference<real> reverse = sum_of(s.sums.b / s.x.sum, -logs);
    if (reverse.sound || (!kLogits && !is_infinite(reverse.value))) {
      row.a = reverse.value;
      row.b = s.mass() - real(1);
      row.c = reverse.sound ? well_separated(kl) : real(0);
      return reverse.value;
    }
  } else {
    row.c = well_separated(loss.kl_fraction() * kl);
  }
  const TermSums<real> sum = second_pass(loss, row);
  row.a = sum.u / sum.q, row.b = kLogits ? sum.v / sum.p : sum.v;
  return sum.f - loss.kappa() * (real(1) - s.mass());
}

}  // namespace fastdiv
