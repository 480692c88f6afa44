// One row of a call: whether it counts, what its sums give, and where its results go.
#pragma once

#include "losses/divergence_value.h"
#include "losses/entropy.h"
#include "losses/row_args.h"
#include "losses/topk.h"

namespace fastdiv {

// Return the weight of a row; 0: the row is ignored.  A row whose label is out of range counts and
// becomes NaN; on a CPU such a label has raised before.
template <class real>
FD_FN real weight_of_row(const RowArgs& a, int64_t r) {
  if (a.labels && a.labels[r] == a.ignore_index) return real(0);
  return a.row_weight ? static_cast<const real*>(a.row_weight)[r] : real(1);
}
FD_FN bool has_class(const RowArgs& a, int64_t r) {
  return !a.labels || (a.labels[r] >= 0 && a.labels[r] < a.classes);
}

// Return what a row adds to the divisor of a mean; class weights count by the label.
template <class real>
FD_FN real weight_in_mean(const RowArgs& a, int64_t r) {
  const real weight = weight_of_row<real>(a, r);
  if (weight == real(0) || !a.labels || !a.class_weight || !has_class(a, r)) return weight;
  return weight * static_cast<const real*>(a.class_weight)[a.labels[r]];
}

template <class P>
struct RowIO {
  using real = typename P::real;
  using Record = typename P::Record;
  static_assert(sizeof(Record) == kRecordSize * sizeof(real), "a record is eight numbers");

  const RowArgs& a;
  int64_t r;

  FD_FN real weight() const { return weight_of_row<real>(a, r); }
  FD_FN bool reads_label() const {
    return P::kReadsLabel && weight() != real(0) && has_class(a, r);
  }
  FD_FN Record& record() const { return static_cast<Record*>(a.record)[r]; }

  // What the forward finds of a row.
  struct Result {
    Record row;
    Outputs<real> out;
    real log_prob;
  };
  // Return value and record from the sums of a row.  `x_label` is the logit of the label if it is
  // read.  `second_pass(loss, row)` reads the row again for the terms of a divergence; with a top-k
  // teacher it is the TopKClasses.
  template <class SecondPass>
  FD_FN Result finish(const P& loss, const RowState<P>& s, real x_label, real scale,
                      const SecondPass& second_pass) const {
    Result result{};
    Record& row = result.row;
    static_cast<Row<real>&>(row) = s.row();
    TargetLogit<real> label{0, 0};
    if (reads_label()) {
      const real* weights = static_cast<const real*>(a.class_weight);
      label = {(x_label - row.x_max) * scale, weights ? weights[a.labels[r]] : real(1)};
      result.log_prob = label.lx - row.x_logz;
    }
    if constexpr (P::kStats && !P::kReadsLabel)
      result.log_prob = s.sums.d - mass_times(s.mass(), row.x_logz);
    if (weight() != real(0)) {
      if constexpr (P::kDivergence)
        result.out.value = divergence_value(loss, s, row, second_pass, a.params);
      else if constexpr (P::kTopK)
        with_topk_class(loss.target, row, scale, [&](const auto& one) {
          result.out.value = topk_value(loss, one, row, second_pass, a.classes - a.k);
        });
      else
        result.out = loss.finish(s.x, s.sums, label, scale, row);
      if (P::kReadsLabel && !has_class(a, r)) {
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
