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

// Call body(class, log p) for the classes of a top-k teacher.
template <class T, class Body>
void each_given(const Row<T>& r, Kept kept, Body body) {
  for (int64_t i = 0; i < r.targets; ++i) body(r.y[i], Columns<1, 0>{i}.of(r.t)[0] - kept.lt);
}

// A divergence from a top-k teacher: F has its terms, and u = d term / d log q.
template <class F>
struct Topk {
  template <class T>
  static Kept forward(const Row<T>& r) {
    const float lx = log_sum_exp(r.x, r.classes, nothing).lx;
    Kept kept{0, lx, log_sum_exp(r.t, r.targets, nothing).lx, 0};
    each_given(r, kept, [&](auto c, float lp) {
      const float lq = r.logit(c) - lx;
      kept.value += F::term(lq, lp), kept.more += F::u(lq, lp);
    });
    return kept;
  }
  template <class T>
  static void backward(const Row<T>& r, Kept kept, float g, T* d) {
    put_gradient(r, kept, d, [&](auto, auto lq) { return -g * kept.more * exp_of(lq); });
    each_given(r, kept, [&](auto c, float lp) {
      put_class(r, kept, d, c, [&](float lq) { return g * (F::u(lq, lp) - kept.more * expf(lq)); });
    });
  }
};
struct KlOfNamed {
  static float term(float lq, float lp) { return expf(lp) * (lp - lq); }
  static float u(float, float lp) { return -expf(lp); }
};
struct ReverseKlOfNamed {
  static float term(float lq, float lp) { return expf(lq) * (lq - lp); }
  static float u(float lq, float lp) { return expf(lq) * (lq - lp + 1); }
};
struct JsOfNamed {
  static float log_m(float lq, float lp) { return logf(0.5f * (expf(lq) + expf(lp))); }
  static float term(float lq, float lp) {
    return 0.5f * expf(lp) * (lp - log_m(lq, lp)) + u(lq, lp);
  }
  static float u(float lq, float lp) { return 0.5f * expf(lq) * (lq - log_m(lq, lp)); }
};

// The same of log-probabilities, with a bucket for the other classes.
struct TopkKlTail {
  static constexpr float kLeast = 1e-6f;
  template <class T>
  static Kept forward(const Row<T>& r) {
    Kept kept{0, log_sum_exp(r.x, r.classes, nothing).lx, 0, 0};
    float left = 1, tail = 1;
    each_given(r, kept, [&](auto c, float lp) {
      const float lq = r.logit(c) - kept.lx;
      kept.value += KlOfNamed::term(lq, lp), left -= expf(lp), tail -= expf(lq);
    });
    if (r.targets == r.classes) return kept.more = 1 - left, kept;
    left = left > kLeast ? left : kLeast;
    kept.value += left * logf(left / (tail > kLeast ? tail : kLeast));
    kept.more = tail > kLeast ? 1 - left / tail : 1;
    return kept;
  }
  template <class T>
  static void backward(const Row<T>& r, Kept kept, float g, T* d) {
    put_gradient(r, kept, d, [&](auto, auto lq) { return g * kept.more * exp_of(lq); });
    const float mass = r.targets == r.classes ? kept.more : 1;  // of all buckets
    each_given(r, kept, [&](auto c, float lp) {
      put_class(r, kept, d, c, [&](float lq) { return g * (mass * expf(lq) - expf(lp)); });
    });
  }
};

}  // namespace
