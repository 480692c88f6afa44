// Entropy of softmax(x): alone, with the log-probability of a label, or as a statistic.
#pragma once

#include "losses/loss.h"

namespace fastdiv {

// The moment is sum e^lx lx.  The entropy is log(sum e^lx) minus moment / sum e^lx.
template <class real>
FD_FN real entropy_moment(const Column<real>& c) {
  return mass_times_log(c.ex, c.lx);
}
template <class real>
FD_FN real entropy_of(const LogSumExp<real>& x, real moment, const Row<real>& row) {
  return row.x_logz - moment / x.sum;
}
// dH/dx.
template <class real>
FD_FN real entropy_slope(real lq, real q, const EntropyRecord<real>& row) {
  return -mass_times_log(q, lq + row.entropy);
}

// H(q) = -sum q log q.
template <class real>
struct Entropy : Loss<real> {
  using Record = EntropyRecord<real>;
  static constexpr int kSums = 1;
  using Loss<real>::Loss;

  FD_FN Sums<real> partial(const Column<real>& c) const { return {entropy_moment(c)}; }
  FD_FN void rebase(Sums<real>& s, Shift<real> dx, Shift<real>) const { s.a = dx.of_moment(s.a); }
  FD_FN Outputs<real> finish(const LogSumExp<real>& x, const Sums<real>& s, TargetLogit<real>, real,
                             Record& row) const {
    row.entropy = entropy_of(x, s.a, row);
    return {row.entropy, row.entropy};
  }
  FD_FN real grad_x(real lq, real q, real, real, const Record& row, Outputs<real> g) const {
    return g.value * entropy_slope(lq, q, row);
  }
};

// log q_y and H(q).
template <class real>
struct LogProbAndEntropy : Entropy<real> {
  using typename Entropy<real>::Record;
  static constexpr bool kReadsLabel = true, kTwoOutputs = true, kSoftcap = true;
  using Entropy<real>::Entropy;

  FD_FN Outputs<real> finish(const LogSumExp<real>& x, const Sums<real>& s, TargetLogit<real> label,
                             real scale, Record& row) const {
    return {label.lx - row.x_logz, Entropy<real>::finish(x, s, label, scale, row).entropy};
  }
  FD_FN real grad_x(real lq, real q, real, real, const Record& row, Outputs<real> g) const {
    return g.entropy * entropy_slope(lq, q, row) - g.value * q;
  }
  FD_FN real grad_label(const Record&, Outputs<real> g) const { return g.value; }
};

// A cross entropy with statistics: c = entropy_moment, d = sum p (x - max) of a soft target.
template <class P>
struct WithStats : P {
  using typename P::real;
  static constexpr bool kStats = true;
  static constexpr int kSums = 4;
  using P::P;

  FD_FN Sums<real> partial(const Column<real>& c) const {
    Sums<real> s = P::partial(c);
    s.c = entropy_moment(c);
    s.d = mass_times(c.et, c.lx);
    return s;
  }
  FD_FN void rebase(Sums<real>& s, Shift<real> dx, Shift<real> dt) const {
    P::rebase(s, dx, dt);
    s.c = dx.of_moment(s.c);
    s.d += mass_times(dt.old_sum, dx.delta);
  }
};

}  // namespace fastdiv
