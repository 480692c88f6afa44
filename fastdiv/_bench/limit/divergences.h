// Losses of two rows of logits.
#pragma once

#include "row.h"

namespace {

struct Kl {
  template <class T>
  static Kept forward(const Row<T>& r) {
    const auto gap = [&](auto at, auto, auto, auto p) { return p * (at.of(r.t) - at.of(r.x)); };
    Kept kept = log_sum_exps(r, 0, 1, gap);
    kept.value = kept.more + kept.lx - kept.lt;
    return kept;
  }
  template <class T>
  static void backward(const Row<T>& r, Kept kept, float g, T* d) {
    const auto p = [&](auto at) { return exp_of(at.of(r.t) - kept.lt); };
    put_gradient(r, kept, d, [&](auto at, auto lq) { return g * (exp_of(lq) - p(at)); });
  }
};

struct ReverseKl {
  template <class T>
  static Kept forward(const Row<T>& r) {
    const Kept kept = Kl::forward(Row<T>{r.t, r.x, r.y, r.classes, r.targets});
    return {kept.value, kept.lt, kept.lx, 0};
  }
  template <class T>
  static void backward(const Row<T>& r, Kept kept, float g, T* d) {
    const float shift = kept.lt - kept.value;
    put_gradient(r, kept, d,
                 [&](auto at, auto lq) { return g * exp_of(lq) * (lq - at.of(r.t) + shift); });
  }
};

// The divergences of S, the sum of p^alpha q^(1 - alpha).
enum class Of { alpha, renyi, hellinger };
template <Of which>
struct Powers {
  static constexpr float alpha = 0.5f, rest = 1 - alpha;
  template <class V>
  static INLINE V power(V lq, V lp) {
    return exp_of(rest * lq + alpha * lp);
  }
  template <class T>
  static Kept forward(const Row<T>& r) {
    const auto term = [](auto, auto lq, auto lp, auto) { return power(lq, lp); };
    Kept kept = log_sum_exps(r, rest, alpha, term);
    kept.value = 1 - kept.more;
    if (which == Of::alpha) kept.value /= alpha * rest;
    if (which == Of::renyi) kept.value = logf(kept.more) / -rest;
    return kept;
  }
  template <class T>
  static void backward(const Row<T>& r, Kept kept, float g, T* d) {
    float by = -g * rest;
    if (which == Of::alpha) by = -g / alpha;
    if (which == Of::renyi) by = -g / kept.more;
    put_gradient(r, kept, d, [&](auto at, auto lq) {
      return by * (power(lq, at.of(r.t) - kept.lt) - kept.more * exp_of(lq));
    });
  }
};

// A sum over classes of f(q, p): the first pass sums exponentials, the second one f and q df/dq.
template <class Term>
struct Divergence {
  template <class T>
  static Kept forward(const Row<T>& r) {
    const auto none = [](auto, auto lq, auto, auto) { return decltype(lq){}; };
    const Kept kept = log_sum_exps(r, 0, 0, none);
    Parts value, slope;
    each(0, r.classes, [&](auto at) {
      const auto term = Term::of(at.of(r.x) - kept.lx, at.of(r.t) - kept.lt);
      at.in(value) += term.f;
      at.in(slope) += term.q * term.slope;
    });
    return {value.fold(plus), kept.lx, kept.lt, slope.fold(plus)};
  }
  template <class T>
  static void backward(const Row<T>& r, Kept kept, float g, T* d) {
    put_gradient(r, kept, d, [&](auto at, auto lq) {
      const auto term = Term::of(lq, at.of(r.t) - kept.lt);
      return g * term.q * (term.slope - kept.more);
    });
  }
};

template <class V>
struct Terms {
  V q, f, slope;  // slope: df/dq
};

struct Js {
  template <class V>
  static INLINE Terms<V> of(V lq, V lp) {
    const V q = exp_of(lq), p = exp_of(lp), lm = log_of(0.5f * (q + p)), slope = 0.5f * (lq - lm);
    return {q, q * slope + 0.5f * p * (lp - lm), slope};
  }
};

struct SkewKl {
  static constexpr float skew = 0.1f;
  template <class V>
  static INLINE Terms<V> of(V lq, V lp) {
    const V q = exp_of(lq), p = exp_of(lp), m = skew * p + (1 - skew) * q;
    return {q, p * (lp - log_of(m)), (skew - 1) * p / m};
  }
};

struct Tv {
  template <class V>
  static INLINE Terms<V> of(V lq, V lp) {
    const V q = exp_of(lq), difference = q - exp_of(lp);
    const V slope = difference > 0 ? V{} + 0.5f : V{} - 0.5f;
    return {q, slope * difference, slope};
  }
};

}  // namespace
