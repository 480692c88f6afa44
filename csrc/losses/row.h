// One row of a call: whether it counts, what its sums give, and where its results go.
#pragma once

#include "losses/divergence_value.h"
#include "losses/entropy.h"
#include "losses/row_args.h"
#include "losses/named.h"

namespace fastdiv {

// A row's label and weight, which say whether it counts.
template <class real>
struct RowWeight {
  int64_t label;  // 0 if the loss has no labels
  real weight;    // 0: the row is ignored

  // Return those of a row.  On a GPU a thread waits for memory whenever it looks.
  static FD_FN RowWeight of(const RowArgs& a, int64_t r) {
    return of(a, a.labels ? a.labels[r] : 0,
              a.row_weight ? static_cast<const real*>(a.row_weight)[r] : real(1));
  }
  static FD_FN RowWeight of(const RowArgs& a, int64_t label, real weight) {
    return {label, a.labels && label == a.ignore_index ? real(0) : weight};
  }

  // Whether the label is a class.  A row whose label is out of range counts and becomes NaN; on a
  // CPU such a label has raised before.
  FD_FN bool has_class(const RowArgs& a) const {
    return !a.labels || (label >= 0 && label < a.classes);
  }
  // Return what the row adds to the divisor of a mean; class weights count by the label.
  FD_FN real in_mean(const RowArgs& a) const {
    if (weight == real(0) || !a.labels || !a.class_weight || !has_class(a)) return weight;
    return weight * static_cast<const real*>(a.class_weight)[label];
  }
};

template <class P>
struct RowIO {
  using real = typename P::real;
  using Record = typename P::Record;
  static_assert(sizeof(Record) == kRecordSize * sizeof(real), "a record is eight numbers");

  const RowArgs& a;
  const int64_t r;
  const RowWeight<real> own;

  FD_FN RowIO(const RowArgs& args, int64_t row)
      : a(args), r(row), own(RowWeight<real>::of(args, row)) {}

  FD_FN real weight() const { return own.weight; }
  FD_FN bool reads_label() const {
    return P::kReadsLabel && weight() != real(0) && own.has_class(a);
  }
  FD_FN Record& record() const { return static_cast<Record*>(a.record)[r]; }

  // What the forward finds of a row.
  struct Result {
    Record row;
    Outputs<real> out;
    real log_prob;
  };
  // Return value and record from the sums of a row.  `x_label` is the logit of the label if it is
  // read.  `second_pass(loss, row)` reads the row again for the terms of a divergence.
  template <class SecondPass>
  FD_FN Result finish(const P& loss, const RowState<P>& s, real x_label, real scale,
                      const SecondPass& second_pass) const {
    Result result{};
    Record& row = result.row;
    static_cast<Row<real>&>(row) = s.row();
    TargetLogit<real> target{0, 0};
    if (reads_label()) {
      const real* weights = static_cast<const real*>(a.class_weight);
      target = {(x_label - row.x_max) * scale, weights ? weights[own.label] : real(1)};
      result.log_prob = target.lx - row.x_logz;
    }
    if constexpr (P::kStats && !P::kReadsLabel)
      result.log_prob = s.sums.d - mass_times(s.mass(), row.x_logz);
    if (weight() != real(0)) {
      if constexpr (P::kDivergence)
        result.out.value = divergence_value(loss, s, row, second_pass, a.params);
      else
        result.out = loss.finish(s.x, s.sums, target, scale, row);
      if (P::kReadsLabel && !own.has_class(a)) {
        const real nan = Limits<real>::nan;
        result.out = {nan, nan};
        row.x_logz = result.log_prob = nan;
      }
    }
    return result;
  }

  // Write value and record; zeros if the row is ignored.
  FD_FN void store(const Result& result) const {
    const real w = weight();
    const bool counts = w != real(0);
    record() = counts ? result.row : Record{};
    static_cast<real*>(a.value)[r] = counts ? result.out.value * w : real(0);
    if (P::kTwoOutputs)
      static_cast<real*>(a.entropy)[r] = counts ? result.out.entropy * w : real(0);
  }
  FD_FN void store_stats(const Result& result, const RowState<P>& s, real scale,
                         int64_t argmax) const {
    real* stats = static_cast<real*>(a.stats);
    stats[r] = s.x.max * scale + log_of(s.x.sum);
    stats[a.rows + r] = entropy_of(s.x, s.sums.c, s.row());
    stats[2 * a.rows + r] = result.log_prob;
    a.argmax[r] = argmax;
  }

  FD_FN void store_terms(const TermSums<real>& sum) const {
    static_cast<TermSums<real>*>(a.terms)[r] = sum;
  }

  // Return the upstream gradients, divided by the divisor of a mean.
  FD_FN Outputs<real> upstream() const { return {upstream(a.grad), upstream(a.grad_entropy)}; }

 private:
  FD_FN real upstream(const void* grad) const {
    const real w = weight();
    if (!grad || w == real(0)) return real(0);
    const real g = static_cast<const real*>(grad)[r * a.grad_stride] * w;
    return a.divisor ? g / *static_cast<const real*>(a.divisor) : g;
  }
};

}  // namespace fastdiv
