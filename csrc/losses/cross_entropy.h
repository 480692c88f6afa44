// Cross entropy, sum_c r_c (lse - x_c) + z omega lse^2.  The target r is a label, a label smoothed
// over the classes, or a distribution p: r_c = weight_c (confidence p_c + smoothing_per_class).
#pragma once

#include "losses/loss.h"

namespace fastdiv {

template <class real, Target target, bool smoothed>
struct CrossEntropyOf : Loss<real, target> {
  using Record = CrossEntropyRecord<real>;
  static constexpr bool kReadsLabel = target == Target::kNone;
  static constexpr bool kWeights = smoothed;
  static constexpr bool kSoftcap = true;
  static constexpr int kSums = smoothed ? 2 : 0;

  real confidence, smoothing_per_class, z_loss;
  bool by_probability;
  FD_FN explicit CrossEntropyOf(const LossParams& p)
      : Loss<real, target>(p),
        confidence(option<real>(p.confidence)),
        smoothing_per_class(option<real>(p.smoothing_per_class)),
        z_loss(option<real>(p.z_loss)),
        by_probability(kReadsLabel && p.by_probability) {}

  // Return r_c without the part of the label, which the kernels add at its column.
  FD_FN real rate(real p, real weight) const {
    if constexpr (!smoothed) return real(0);
    return kReadsLabel ? weight * smoothing_per_class
                       : weight * (confidence * p + smoothing_per_class);
  }

  // a = sum r (x - max), b = sum r
  FD_FN Sums<real> partial(const Column<real>& c) const {
    if constexpr (!smoothed) return {};
    const real r = rate(c.et, c.weight);
    return {mass_times(r, c.lx), r};
  }
  FD_FN void rebase(Sums<real>& s, Shift<real> dx, Shift<real>) const {
    if constexpr (smoothed) s.a += mass_times(s.b, dx.delta);
  }

  FD_FN Outputs<real> finish(const LogSumExp<real>&, const Sums<real>& s, TargetLogit<real> label,
                             real scale, Record& row) const {
    const real label_mass = kReadsLabel ? confidence * label.weight : real(0);
    const real mass = s.b + label_mass, taken = s.a + mass_times(label_mass, label.lx);
    const real lse = row.x_logz + row.x_max * scale;
    const real omega = kReadsLabel ? label.weight : real(1);
    const real own = by_probability ? exp_neg(label.lx - row.x_logz) : real(1);
    row.own_weight = own;
    row.label_mass = own * label_mass;
    row.q_factor = own * (mass + real(2) * mass_times(z_loss * omega, lse));
    const real value = mass_times(mass, row.x_logz) - taken + mass_times(z_loss * omega, lse * lse);
    return {mass_times(own, value), real(0)};
  }

  FD_FN real grad_x(real, real q, real p, real weight, const Record& row, Outputs<real> g) const {
    const real own = smoothed && kReadsLabel ? row.own_weight : real(1);
    return g.value * (row.q_factor * q - own * rate(p, weight));
  }
  FD_FN real grad_label(const Record& row, Outputs<real> g) const {
    return -g.value * row.label_mass;
  }
  // An infinite term is a constant, so its target gets no gradient.
  FD_FN real grad_t(real lq, real weight, real g) const {
    return is_infinite(lq) ? real(0) : -g * weight * confidence * lq;
  }
};

template <class real>
using CrossEntropy = CrossEntropyOf<real, Target::kNone, false>;
template <class real>
using SmoothedCrossEntropy = CrossEntropyOf<real, Target::kNone, true>;
template <class real>
using SoftCrossEntropy = CrossEntropyOf<real, Target::kProbs, true>;

}  // namespace fastdiv
