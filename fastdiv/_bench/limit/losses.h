// Losses of one row of logits.
#pragma once

#include "row.h"

namespace {

// The log-probability of the label times a, plus the entropy times b.
template <int a, int percent>
struct LogProbAndEntropy {
  static constexpr float b = percent / 100.f;
  template <class T>
  static Kept forward(const Row<T>& r) {
    const auto term = [](auto, auto x, auto e) { return e * (percent ? x : decltype(x){}); };
    Kept kept = log_sum_exp(r.x, r.classes, term);
    kept.more = kept.lx - kept.more;  // the entropy
    kept.value = percent ? b * kept.more : 0;
    if (a) kept.value += a * (r.logit(*r.y) - kept.lx);
    return kept;
  }
  template <class T>
  static void backward(const Row<T>& r, Kept kept, float g, T* d) {
    const float slope = -g * b, constant = -g * a + (percent ? slope * kept.more : 0);
    put_gradient(r, kept, d, [&](auto, auto lq) {
      return exp_of(lq) * (percent ? constant + slope * lq : decltype(lq){} + constant);
    });
    const auto of_label = [&](float lq) { return expf(lq) * (constant + slope * lq) + g * a; };
    if (a) put_class(r, kept, d, *r.y, of_label);
  }
};

// Cross entropy of a label, smoothed over all classes.
struct Smoothed {
  static constexpr float epsilon = 0.1f;
  template <class T>
  static Kept forward(const Row<T>& r) {
    Parts sum;
    Kept kept = log_sum_exp(r.x, r.classes, [&](auto at, auto x, auto) {
      at.in(sum) += x;
      return decltype(x){};
    });
    const float target = (1 - epsilon) * r.logit(*r.y) + epsilon * sum.fold(plus) / r.classes;
    kept.value = kept.lx - target;
    return kept;
  }
  template <class T>
  static void backward(const Row<T>& r, Kept kept, float g, T* d) {
    const float p = epsilon / r.classes, p_of_label = p + 1 - epsilon;
    put_gradient(r, kept, d, [&](auto, auto lq) { return g * (exp_of(lq) - p); });
    put_class(r, kept, d, *r.y, [&](float lq) { return g * (expf(lq) - p_of_label); });
  }
};

// Cross entropy of a row of probabilities.
struct OfProbs {
  template <class T>
  static Kept forward(const Row<T>& r) {
    Parts mass, sum;
    const Kept kept = log_sum_exp(r.x, r.classes, [&](auto at, auto x, auto) {
      const auto p = at.of(r.t);
      at.in(mass) += p;
      at.in(sum) += p * x;
      return decltype(x){};
    });
    const float p = mass.fold(plus);
    return {p * kept.lx - sum.fold(plus), kept.lx, 0, p};
  }
  template <class T>
  static void backward(const Row<T>& r, Kept kept, float g, T* d) {
    const auto gradient = [&](auto at, auto lq) { return kept.more * exp_of(lq) - at.of(r.t); };
    put_gradient(r, kept, d, [&](auto at, auto lq) { return g * gradient(at, lq); });
  }
};

struct TopkKl {
  template <class T>
  static Kept forward(const Row<T>& r) {
    const float lx = log_sum_exp(r.x, r.classes, nothing).lx;
    Kept kept{0, lx, log_sum_exp(r.t, r.targets, nothing).lx, 0};
    each_given(r, kept, [&](auto c, float lp) { kept.value += expf(lp) * (lp - r.logit(c) + lx); });
    return kept;
  }
  template <class T>
  static void backward(const Row<T>& r, Kept kept, float g, T* d) {
    put_gradient(r, kept, d, [&](auto, auto lq) { return g * exp_of(lq); });
    each_given(r, kept, [&](auto c, float lp) {
      put_class(r, kept, d, c, [&](float lq) { return g * (expf(lq) - expf(lp)); });
    });
  }
  template <class T, class Body>
  static void each_given(const Row<T>& r, Kept kept, Body body) {
    for (int64_t i = 0; i < r.targets; ++i) body(r.y[i], Columns<1, 0>{i}.of(r.t)[0] - kept.lt);
  }
};

}  // namespace
