// A row: its sums of exponentials, which every loss takes, and its gradient.
#pragma once

#include <cmath>

#include "columns.h"

namespace {

template <class T>
struct Row {
  const T *x, *t;
  const int64_t* y;
  int64_t classes, targets;  // targets: entries of t and of y

  float logit(int64_t c) const { return Columns<1, 0>{c}.of(x)[0]; }
};

// What a forward keeps of a row: its value, log sum e^x and log sum e^t, one more sum.
struct Kept {
  float value, lx, lt, more;
};

// The largest logit of a row so far, to which its sums of exponentials are relative.
template <class T>
struct Largest {
  const T* row;
  float value = -3e38f, moved = 0;  // moved: by which its rise changes the exponents

  // Look through a tile, and tell whether it rises.
  INLINE bool rises(int64_t begin, int64_t end) {
    Parts parts(value);
    each(begin, end, [&](auto at) { at.in(parts) = larger(at.in(parts), at.of(row)); });
    const float before = value;
    value = parts.fold(larger);
    moved = before - value;
    return moved < 0;
  }
};

constexpr auto nothing = [](auto, auto v, auto) { return decltype(v){}; };

// Return log sum e^x, and the mean over q of `term`, which gets columns, x and e^(x - a constant)
// and returns a number times that exponential.
template <class T, class Term>
INLINE Kept log_sum_exp(const T* x, int64_t classes, Term term) {
  Largest<T> top{x};
  Parts sum, mean;
  tiles(classes, [&](int64_t begin, int64_t end) {
    if (top.rises(begin, end)) sum.scale(expf(top.moved)), mean.scale(expf(top.moved));
    each(begin, end, [&](auto at) {
      const auto v = at.of(x), e = exp_of(v - top.value);
      at.in(sum) += e;
      at.in(mean) += term(at, v, e);
    });
  });
  const float total = sum.fold(plus);
  return {0, top.value + logf(total), 0, mean.fold(plus) / total};
}

// Return both log sums, and the sum of `term`, which gets columns, log q and log p up to constants
// and e^log p.  It returns a number times q^a p^b, as far as the constants go.
template <class T, class Term>
INLINE Kept log_sum_exps(const Row<T>& r, float a, float b, Term term) {
  Largest<T> x{r.x}, t{r.t};
  Parts sum_x, sum_t, more;
  tiles(r.classes, [&](int64_t begin, int64_t end) {
    const bool x_rises = x.rises(begin, end), t_rises = t.rises(begin, end);
    if (x_rises) sum_x.scale(expf(x.moved));
    if (t_rises) sum_t.scale(expf(t.moved));
    if (x_rises || t_rises) more.scale(expf(a * x.moved + b * t.moved));
    each(begin, end, [&](auto at) {
      const auto lq = at.of(r.x) - x.value, lp = at.of(r.t) - t.value, p = exp_of(lp);
      at.in(sum_x) += exp_of(lq);
      at.in(sum_t) += p;
      at.in(more) += term(at, lq, lp, p);
    });
  });
  const float lx = logf(sum_x.fold(plus)), lt = logf(sum_t.fold(plus));
  return {0, x.value + lx, t.value + lt, more.fold(plus) * expf(-a * lx - b * lt)};
}

// Write the gradient from a function of columns and log q.
template <class T, class Gradient>
INLINE void put_gradient(const Row<T>& r, Kept kept, T* d, Gradient gradient) {
  each(0, r.classes, [&](auto at) { at.put(d, gradient(at, at.of(r.x) - kept.lx)); });
}

// Write it for one class, where the function for all classes is wrong.
template <class T, class Gradient>
void put_class(const Row<T>& r, Kept kept, T* d, int64_t c, Gradient gradient) {
  Columns<1, 0>{c}.put(d, Floats<1>{} + gradient(r.logit(c) - kept.lx));
}

}  // namespace
