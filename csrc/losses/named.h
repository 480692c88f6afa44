// The log-probabilities of k named classes of a row, and one number about the rest, which are the
// classes without a name.  log_prob returns them, and the losses of top-k teachers use them.
//
// Why the gradient is what it is: a scaled logit moves a log-probability by
// d log q_c / d x_j = [c = j] - q_j.  So with upstream gradients g and their sum G,
//   named class   dx_j = g_j - G q_j
//   the rest      dx_j = g_tail q_j / Q + g_mean / others - G q_j,   Q = its mass.
// These few numbers are computed in double, so that the losses of a teacher keep their digits.
#pragma once

#include "losses/loss.h"
#include "losses/row_args.h"

namespace fastdiv {

enum class Rest : int { kNone, kTail, kMean };  // what is returned of it: log Q, or the mean log q

FD_FN Rest rest_of(LossId loss) {
  if (loss == LossId::k_topk_log_prob_and_tail) return Rest::kTail;
  return loss == LossId::k_topk_log_prob_and_mean ? Rest::kMean : Rest::kNone;
}
// Whether a class may be named once only.  The results are then in double, too.
FD_FN bool names_once(LossId loss) { return loss != LossId::k_log_prob; }

// has_rest: whether a number about the rest is returned, too.
template <class real, bool has_rest>
struct NamedLogProbs : Loss<real> {
  using Record = NamedRecord<real>;
  static constexpr bool kNamed = true;
  static constexpr bool kRest = has_rest;
  static constexpr bool kSoftcap = !has_rest;

  const Rest rest;

  FD_FN explicit NamedLogProbs(const LossParams& p) : Loss<real>(p), rest(rest_of(p.loss)) {}

  // Return the gradient of a class of the rest.  g is what dense_upstream returns, times the scale.
  FD_FN real grad_x(real, real q, real, real, const Record&, Outputs<real> g) const {
    return g.value * q + g.entropy;
  }
};

template <class real>
using LogProbs = NamedLogProbs<real, false>;
template <class real>
using LogProbsAndRest = NamedLogProbs<real, true>;

// The names of a row, its values and their upstream gradients.
template <class real>
struct NamedRow {
  const RowArgs& a;
  const int64_t r;

  FD_FN int64_t size() const { return a.k + (rest_of(a.params.loss) != Rest::kNone); }

  FD_FN bool is_padding(int64_t j) const { return a.indices.at(r, j) == kNoClass; }
  // Return the column of a name.  It is out of range for padding, and for a class of another block.
  FD_FN int64_t column(int64_t j) const {
    return is_padding(j) ? kNoClass : a.indices.at(r, j) - a.first_class;
  }
  FD_FN bool is_column(int64_t column) const { return uint64_t(column) < uint64_t(a.classes); }

  struct Count {
    int64_t names;
    bool wrong;  // one of them is out of range
  };
  FD_FN Count count() const {
    Count n{0, false};
    for (int64_t j = 0; j < a.k; ++j) {
      const bool padding = is_padding(j);
      n.names += !padding;
      n.wrong = n.wrong || !(padding || is_column(column(j)));
    }
    return n;
  }
  // Whether a row counts: its weight is not 0, and it has a name.
  FD_FN bool counts(real weight) const {
    bool named = false;
    for (int64_t j = 0; j < a.k && !named; ++j) named = !is_padding(j);
    return named && weight != real(0);
  }

  FD_FN void set_value(int64_t j, double v) const {
    const int64_t i = r * size() + j;
    if (names_once(a.params.loss))
      static_cast<double*>(a.value)[i] = v;
    else
      static_cast<real*>(a.value)[i] = real(v);
  }
  FD_FN double upstream(int64_t j) const {
    const int64_t i = r * size() + j;
    return names_once(a.params.loss) ? static_cast<const double*>(a.grad)[i]
                                     : double(static_cast<const real*>(a.grad)[i]);
  }
  // Whether no earlier name is of the same class.
  FD_FN bool is_first(int64_t j) const {
    if (names_once(a.params.loss)) return true;
    for (int64_t i = 0; i < j; ++i)
      if (a.indices.at(r, i) == a.indices.at(r, j)) return false;
    return true;
  }
  // Return the sum of the upstream gradients of the class that has name j.
  FD_FN double upstream_of_class(int64_t j) const {
    if (names_once(a.params.loss)) return upstream(j);
    double sum = 0;
    for (int64_t i = 0; i < a.k; ++i)
      if (a.indices.at(r, i) == a.indices.at(r, j)) sum += upstream(i);
    return sum;
  }

  struct Upstream {
    double sum = 0, rest = 0;
    bool zero = true;
  };
  FD_FN Upstream upstream() const {
    Upstream g;
    const auto add = [&](double v) { g.sum += v, g.zero = g.zero && v == 0; };
    for (int64_t j = 0; j < a.k; ++j)
      if (!is_padding(j)) add(upstream(j));
    if (size() > a.k) add(g.rest = upstream(a.k));
    return g;
  }
};

// Return what grad_x takes: the factor of q, and what is added to it.
template <class P, class real = typename P::real>
FD_FN Outputs<real> dense_upstream(const P& loss, const typename NamedRow<real>::Upstream& g,
                                   const NamedRecord<real>& row) {
  if constexpr (!P::kRest) return {real(-g.sum), real(0)};
  double factor = -g.sum, added = 0;
  if (loss.rest == Rest::kMean) added = g.rest / double(row.others);
  if (loss.rest == Rest::kTail && !is_infinite(row.log_tail))
    factor = row.shift != real(0) ? g.rest : factor + g.rest * exp(-double(row.log_tail));
  return {real(factor), row.others > real(0) ? real(added) : real(0)};
}

// Sums over the named classes: of e^lx, and of the finite logits.
struct NamedSums {
  double mass = 0, finite = 0, count = 0;

  FD_FN void add(const NamedSums& o) { mass += o.mass, finite += o.finite, count += o.count; }
  FD_FN void add_logit(double x) {
    if (!is_infinite(x)) finite += x, count += 1;
  }
};

// The log-probability of a class from its logit.
template <class real>
struct LogProbOf {
  double max, scale, logz;

  FD_FN double operator()(double x) const { return (x - max) * scale - logz; }
};

// Below this share of the mass, the rest is summed apart: as a difference, it has few digits.
constexpr double kLeastDifference = 1.0 / 128;
// Below this log of its mass, the gradient takes q / Q from logits that are relative to Q.
constexpr double kLeastLogTail = -60;

// Write the values of a row, and fill in its record.  `classes` divides the names among threads,
// and has sums: named(), all(), others().
template <class P, class Classes, class real = typename P::real>
FD_FN void finish_named(const P& loss, const NamedRow<real>& names, const LogSumExp<real>& all,
                        real scale, NamedRecord<real>& row, const Classes& classes) {
  const auto count = names.count();
  const double logz = count.wrong ? Limits<double>::nan : log_of(double(all.sum));
  const LogProbOf<real> log_q{double(all.max), double(scale), logz};
  const double others = double(names.a.classes - count.names), inf = Limits<double>::infinity;
  row.x_max = all.max, row.x_logz = real(logz), row.others = real(others);
  double rest = loss.rest == Rest::kMean ? 0 : -inf;  // if there are no others
  if constexpr (!P::kRest) return classes.write_values(log_q, rest);
  if (loss.rest == Rest::kTail && others > 0) {
    const double mass = double(all.sum) - classes.named(log_q).mass;
    if (mass >= kLeastDifference * double(all.sum)) {
      rest = log_of(mass) - logz;
    } else {
      const LogSumExp<real> apart = classes.others();
      rest = log_q(double(apart.max)) + log_of(double(apart.sum));
    }
  }
  if (loss.rest == Rest::kMean && others > 0) {
    const NamedSums whole = classes.all(), named = classes.named(log_q);
    const bool finite = whole.count - named.count == others;
    rest = finite ? log_q((whole.finite - named.finite) / others) : -inf;
  }
  if (count.wrong || logz != logz) rest = Limits<double>::nan;
  row.log_tail = real(rest);
  if (loss.rest == Rest::kTail && rest < kLeastLogTail && rest > -inf)
    row.shift = real(rest), row.x_logz = real(logz + rest);
  classes.write_values(log_q, rest);
}

// Return the gradient of a named class, without the scale.
template <class real>
FD_FN double named_gradient(const NamedRecord<real>& row, real x, real scale, double of_class,
                            double sum) {
  const LogProbOf<real> log_q{double(row.x_max), double(scale),
                              double(row.x_logz) - double(row.shift)};
  return of_class - (sum == 0 ? 0 : sum * double(exp_neg(real(log_q(double(x))))));
}

}  // namespace fastdiv
