// The online softmax: the state of a row that was read in part, and how two such states merge.
#pragma once

#include "common/math.h"

namespace fastdiv {

// What the target holds.  kNone: class indices, or there is no target.
enum class Target : int { kNone = 0, kLogits = 1, kLogProbs = 2, kProbs = 3 };

// Some columns of a row: on a CPU a tile in the L1 cache, on a GPU the registers of a thread.
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
  FD_FN void rebase(const P& loss, real x_max, real t_max, real scale) {
    if (x_max == x.max && t_max == t.max) return;  // no bit would change
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
  }

  // Add a tile, with new maxima if it has larger numbers.
  template <int kRun = 0>
  FD_FN void push(const P& loss, const Tile<real>& tile, real scale) {
    rebase(loss, max_of(tile.x, tile.n, x.max), kNormalise ? max_of(tile.t, tile.n, t.max) : t.max,
           scale);
    add<kRun>(loss, tile, scale);
  }

  // Add a tile.  Rounding errors grow with the number of terms.  So with kRun > 0, the sums that
  // decide the last digits of the value are added up in runs of kRun columns.
  // kNarrow: of numbers of 16 bits, whose differences need no rounding errors added back.
  template <int kRun = 0, bool kNarrow = false>
  FD_FN void add(const P& loss, const Tile<real>& tile, real scale) {
    Parts total;
    if constexpr (P::kExactRatio && kRun > 0) {
      for (int i = 0; i < tile.n; i += kRun)
        total.add(parts_of<kNarrow>(loss, tile, scale, i, tile.n - i < kRun ? tile.n : i + kRun));
    } else {
      total = parts_of<kNarrow>(loss, tile, scale, 0, tile.n);
    }
    x.sum += total.x, t.sum += total.t;
    sums.add(total.sums);
    if constexpr (P::kTilted) push_tilted<kNarrow>(loss, tile, scale);
  }

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
  struct Parts {
    real x = 0, t = 0;
    Sums<real> sums;

    FD_FN void add(const Parts& o) { x += o.x, t += o.t, sums.add(o.sums); }
  };
  // Return what columns [begin, end) of a tile add to the sums, with the current maxima.
  template <bool kNarrow>
  FD_FN Parts parts_of(const P& loss, const Tile<real>& tile, real scale, int begin,
                       int end) const {
    // An order alpha magnifies the errors of its sums.
    constexpr bool kApprox = !P::kTilted || kNarrow;
    const real x_max = x.max, t_max = kNormalise ? t.max : real(0);
    real x_sum = 0, t_sum = 0, a = 0, b = 0, c = 0, d = 0;
    FD_SIMD(reduction(+ : x_sum, t_sum, a, b, c, d))
    for (int i = begin; i < end; ++i) {
      Column<real> col{};
      col.lx = (tile.x[i] - x_max) * scale;
      col.ex = kApprox ? approx_exp(tile.x[i] - x_max, scale) : exp_neg(col.lx);
      col.weight = P::kWeights ? tile.weights[i] : real(1);
      if constexpr (kTarget != Target::kNone) {
        const real lt = log_target<kTarget>(tile.t[i], t_max, real(0), scale);
        if constexpr (kTarget == Target::kProbs)
          col.et = tile.t[i];
        else
          col.et = !kApprox     ? exp_neg(lt)
                   : kNormalise ? approx_exp(tile.t[i] - t_max, scale)
                                : approx_exp(lt, real(1));
        // Where the last digits count, take the difference of the logits themselves: those minus
        // their maxima are rounded.
        if constexpr (!kNormalise)
          col.ratio = lt - col.lx;
        else if constexpr (!P::kExactRatio)
          col.ratio = ((tile.t[i] - t_max) - (tile.x[i] - x_max)) * scale;
        else if constexpr (kNarrow)
          col.ratio = ((x_max - t_max) - (tile.x[i] - tile.t[i])) * scale;
        else
          col.ratio = -difference_of_differences(tile.x[i], tile.t[i], x_max, t_max) * scale;
        t_sum += col.et;
      }
      x_sum += col.ex;
      const Sums<real> s = loss.partial(col);
      if constexpr (P::kSums > 0) a += s.a;
      if constexpr (P::kSums > 1) b += s.b;
      if constexpr (P::kSums > 2) c += s.c, d += s.d;
    }
    return {x_sum, t_sum, {a, b, c, d}};
  }
  template <bool kNarrow>
  FD_FN void push_tilted(const P& loss, const Tile<real>& tile, real scale) {
    const real x_max = x.max, t_max = t.max, inf = Limits<real>::infinity;
    real infinite = 0, sum = 0;
    FD_SIMD(reduction(+ : infinite))
    for (int i = 0; i < tile.n; ++i) {
      const real lx = (tile.x[i] - x_max) * scale;
      const real lt = log_target<kTarget>(tile.t[i], kNormalise ? t_max : real(0), real(0), scale);
      const real v = loss.tilt(lx, lt);
      // An infinite v is a class with mass on one side only.  It counts if that mass is not 0.
      const real log_larger = lx > lt ? lx : lt;
      const real once = log_larger > Limits<real>::log_smallest ? real(1) : real(0);
      infinite += v == inf ? once : real(0);
      const real finite = v == inf ? -inf : v;
      tile.tilted[i] = log_larger == -inf ? -inf : finite;
    }
    tilted.rebase(max_of(tile.tilted, tile.n, tilted.max), real(1));
    const real max = tilted.max;
    FD_SIMD(reduction(+ : sum))
    for (int i = 0; i < tile.n; ++i) {
      const real v = tile.tilted[i] - max;
      sum += kNarrow ? approx_exp(v, real(1)) : exp_neg(v);  // alpha magnifies its error
    }
    tilted.sum += sum;
    sums.b += infinite;
  }
};

}  // namespace fastdiv
