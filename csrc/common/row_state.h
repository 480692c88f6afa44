// The online softmax: the state of a row that was read in part, and how two such states merge.
#pragma once

#include "common/math.h"

namespace fastdiv {

// What the target holds.  kNone: class indices, or there is no target.
enum class Target : int { kNone = 0, kLogits = 1, kLogProbs = 2, kProbs = 3 };

// Some columns of a row, in the registers of a thread of a GPU.
template <class real>
struct Tile {
  const real* x;        // input logits, softcapped
  const real* t;        // target row, or null
  const real* weights;  // class weights, or null
  int n;
  real* tilted = nullptr;  // space for n numbers where the loss is kTilted
};

// One column in the first pass.
template <class real>
struct Column {
  real lx, ex;  // scaled logit minus the running maximum, and its exponential
  real et;      // this exponential for the target row, or the given probability
  real ratio;   // log of et / ex
  real weight;  // class weight
};

// What the backward needs of any row.  Each loss adds numbers of its own: losses/record.h.
template <class real>
struct Row {
  real x_max, x_logz;  // log q = (x - x_max) * scale - x_logz
  real t_max, t_logz;  // the same for log p if the target is logits; else 0
};

// A change of the running maximum: delta = old maximum - new maximum, ratio = e^delta, and the sum
// under the old maximum.
template <class real>
struct Shift {
  real ratio, delta, old_sum;

  // Return the sum of e^l l, l = logit - maximum, under the new maximum.
  FD_FN real of_moment(real sum) const {
    return mass_times(ratio, sum + mass_times(old_sum, delta));
  }
};

template <class real>
struct Shifts {
  Shift<real> x, t;
};

// A running log-sum-exp.  The maximum starts at the lowest finite number, so that e^(-inf - max) is
// 0 and not NaN.  So rows masked with -inf or with finfo.min need no branch.
template <class real>
struct LogSumExp {
  real max = Limits<real>::lowest, sum = 0;

  FD_FN Shift<real> rebase(real to, real scale) {
    const real delta = (max - to) * scale;
    const Shift<real> shift{exp_neg(delta), delta, sum};
    max = to;
    sum *= shift.ratio;
    return shift;
  }
};

// The sums that a loss keeps beside the log-sum-exps.  Each loss says what they are.
template <class real>
struct Sums {
  real a = 0, b = 0, c = 0, d = 0;

  FD_FN void add(const Sums& o) { a += o.a, b += o.b, c += o.c, d += o.d; }
};

template <Target kTarget, class real>
FD_FN real log_target(real t, real t_max, real t_logz, real scale) {
  if constexpr (kTarget == Target::kLogits) return (t - t_max) * scale - t_logz;
  if constexpr (kTarget == Target::kProbs) return log_of(t);
  return t;
}

// P is a policy of csrc/losses, with these members:
//   kTarget, kWeights  which rows it reads
//   partial            what it sums over the columns, the first kSums of Sums
//   rebase             how the sums change with the maxima
//   tilt, if kTilted   a mixture of the logs of both rows, which gets a log-sum-exp of its own
template <class P>
struct RowState {
  using real = typename P::real;
  static constexpr Target kTarget = P::kTarget;
  static constexpr bool kNormalise = kTarget == Target::kLogits;

  LogSumExp<real> x, t, tilted;
  Sums<real> sums;

  // Change to new maxima, which are at least as large.
  FD_FN Shifts<real> rebase(const P& loss, real x_max, real t_max, real scale) {
    if (x_max == x.max && t_max == t.max) return {{1, 0, x.sum}, {1, 0, t.sum}};
    const Shift<real> dx = x.rebase(x_max, scale);
    const Shift<real> dt = kNormalise ? t.rebase(t_max, scale) : Shift<real>{1, 0, t.sum};
    loss.rebase(sums, dx, dt);
    if constexpr (P::kTilted)
      if (tilted.sum != real(0)) {
        const real shift = loss.tilt(dx.delta, dt.delta);
        if (shift != shift || is_infinite(shift)) {
          // All so far was masked with finfo.min on one side at least, and has no mass there now.
          if (shift > real(0) && (dx.ratio > real(0) || dt.ratio > real(0))) sums.b += real(1);
          tilted = {};
        } else {
          // The sum takes the rounding error of the maximum.  A GPU has many maxima per row.
          const real rounding = rounding_of(tilted.max, -shift);
          tilted.max += shift;
          tilted.sum += tilted.sum * rounding;
        }
      }
    return {dx, dt};
  }

  // Return what a column is in the first pass, under these maxima.  kApprox: with approx_exp, whose
  // errors an order alpha would magnify.
  template <bool kApprox>
  static FD_FN Column<real> column(real x, real t, real weight, real x_max, real t_max,
                                   real scale) {
    const real lx = (x - x_max) * scale;
    const real ex = kApprox ? approx_exp(x - x_max, scale) : exp_neg(lx);
    if constexpr (kTarget == Target::kNone) return {lx, ex, real(0), real(0), weight};
    const real lt = log_target<kTarget>(t, t_max, real(0), scale);
    real et = t;
    if constexpr (kTarget != Target::kProbs)
      et = !kApprox     ? exp_neg(lt)
           : kNormalise ? approx_exp(t - t_max, scale)
                        : approx_exp(lt, real(1));
    return {lx, ex, et, lt - lx, weight};
  }

  // Return the log of the mixture in a column under these maxima; -inf for a class without mass,
  // and for an infinite term, a class with mass on one side only.
  static FD_FN real tilted_log(const P& loss, real x, real t, real x_max, real t_max, real scale) {
    const real inf = Limits<real>::infinity;
    const real lx = (x - x_max) * scale;
    const real lt = log_target<kTarget>(t, t_max, real(0), scale);
    const real v = loss.tilt(lx, lt), finite = v == inf ? -inf : v;
    return (lx > lt ? lx : lt) == -inf ? -inf : finite;
  }
  // Return 1 for an infinite term whose mass is not 0, else 0.
  static FD_FN real infinite_term(const P& loss, real x, real t, real x_max, real t_max,
                                  real scale) {
    const real lx = (x - x_max) * scale;
    const real lt = log_target<kTarget>(t, t_max, real(0), scale);
    const real once = (lx > lt ? lx : lt) > Limits<real>::log_smallest ? real(1) : real(0);
    return loss.tilt(lx, lt) == Limits<real>::infinity ? once : real(0);
  }

  // Add a tile whose numbers are at most the maxima, or little larger.
  template <bool kApprox>
  FD_FN void add(const P& loss, const Tile<real>& tile, real scale) {
    const real x_max = x.max, t_max = target_max();
    real x_sum = 0, t_sum = 0, a = 0, b = 0, c = 0, d = 0;
    FD_SIMD(reduction(+ : x_sum, t_sum, a, b, c, d))
    for (int i = 0; i < tile.n; ++i) {
      const Column<real> col =
          column<kApprox>(tile.x[i], kTarget == Target::kNone ? real(0) : tile.t[i],
                          P::kWeights ? tile.weights[i] : real(1), x_max, t_max, scale);
      x_sum += col.ex;
      if constexpr (kTarget != Target::kNone) t_sum += col.et;
      const Sums<real> s = loss.partial(col);
      if constexpr (P::kSums > 0) a += s.a;
      if constexpr (P::kSums > 1) b += s.b;
      if constexpr (P::kSums > 2) c += s.c, d += s.d;
    }
    x.sum += x_sum, t.sum += t_sum;
    sums.add({a, b, c, d});
    if constexpr (P::kTilted) add_tilted<kApprox>(loss, tile, scale);
  }
  // Return what is subtracted from the target's logits; 0 from anything else.
  FD_FN real target_max() const { return kNormalise ? t.max : real(0); }

  FD_FN void merge(const P& loss, RowState o, real scale) {
    const real x_max = o.x.max > x.max ? o.x.max : x.max;
    const real t_max = o.t.max > t.max ? o.t.max : t.max;
    rebase(loss, x_max, t_max, scale);
    o.rebase(loss, x_max, t_max, scale);
    x.sum += o.x.sum, t.sum += o.t.sum;
    sums.add(o.sums);
    if constexpr (P::kTilted) {
      const real max = o.tilted.max > tilted.max ? o.tilted.max : tilted.max;
      tilted.rebase(max, real(1)), o.tilted.rebase(max, real(1));
      tilted.sum += o.tilted.sum;
    }
  }

  // Return what the first pass found.
  FD_FN Row<real> row() const {
    Row<real> r{};
    r.x_max = x.max, r.x_logz = log_of(x.sum);
    if constexpr (kNormalise) r.t_max = t.max, r.t_logz = log_of(t.sum);
    return r;
  }
  // Return the sum of p: 1 unless the target is probabilities.
  FD_FN real mass() const { return kNormalise || kTarget == Target::kNone ? real(1) : t.sum; }

 private:
  template <bool kApprox>
  FD_FN void add_tilted(const P& loss, const Tile<real>& tile, real scale) {
    const real x_max = x.max, t_max = target_max();
    real infinite = 0, sum = 0;
    FD_SIMD(reduction(+ : infinite))
    for (int i = 0; i < tile.n; ++i) {
      tile.tilted[i] = tilted_log(loss, tile.x[i], tile.t[i], x_max, t_max, scale);
      infinite += infinite_term(loss, tile.x[i], tile.t[i], x_max, t_max, scale);
    }
    tilted.rebase(max_of(tile.tilted, tile.n, tilted.max), real(1));
    const real max = tilted.max;
    FD_SIMD(reduction(+ : sum))
    for (int i = 0; i < tile.n; ++i) {
      const real v = tile.tilted[i] - max;
      sum += kApprox ? approx_exp(v, real(1)) : exp_neg(v);
    }
    tilted.sum += sum;
    sums.b += infinite;
  }
};

}  // namespace fastdiv
