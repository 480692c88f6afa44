// Log-sum-exp of a row beside the plain sum of its logits: all that a loss with a few named classes
// (topk_kl_div) needs of the others.
#pragma once

#include "losses/loss.h"

namespace fastdiv {

// log sum e^lx and sum lx of the scaled logits.  A class at -inf is left out of the sum, as a
// constant: its gradient is that of the others.  Their gradient g.value q + g.entropy is any
// function that is linear in q, so one backward serves whatever treats the classes alike.
// Row: a = sum of lx - max over the finite classes, b = how many these are.
template <class real>
struct LogSumExpAndSum : Loss<real> {
  static constexpr bool kTwoOutputs = true;
  static constexpr int kSums = 2;
  using Loss<real>::Loss;

  FD_FN Sums<real> partial(const Column<real>& c) const {
    const bool finite = !is_infinite(c.lx);
    return {finite ? c.lx : real(0), finite ? real(1) : real(0)};
  }
  FD_FN void rebase(Sums<real>& s, Shift<real> dx, Shift<real>) const {
    s.a += mass_times(s.b, dx.delta);
  }
  FD_FN Outputs<real> finish(const LogSumExp<real>&, const Sums<real>& s, Label<real>, real scale,
                             Row<real>& row) const {
    row.a = s.a, row.b = s.b;
    const real max = row.x_max * scale;
    return {row.x_logz + max, s.a + mass_times(s.b, max)};
  }
  FD_FN real grad_x(real, real q, real, real, const Row<real>&, Outputs<real> g) const {
    return g.value * q + g.entropy;
  }
};

}  // namespace fastdiv
