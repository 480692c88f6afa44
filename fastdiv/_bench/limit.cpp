// The yardstick of the benchmark: the arithmetic of the losses in plain loops, vectorised by hand.
//
// It shows what a core can do.  It leaves out what the losses must keep: there are no rules for NaN
// and infinite logits, no exact values near zero, no options.  limit.py compiles it with -DW=n for
// vectors of n floats.  The constants are those of losses.py.
#include "limit_vectors.h"

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
INLINE void put_gradient(const Row<T>& r, const Kept& kept, T* d, Gradient gradient) {
  each(0, r.classes, [&](auto at) { at.put(d, gradient(at, at.of(r.x) - kept.lx)); });
}

// Write it for one class, where the function for all classes is wrong.
template <class T, class Gradient>
void put_class(const Row<T>& r, const Kept& kept, T* d, int64_t c, Gradient gradient) {
  Columns<1, 0>{c}.put(d, Floats<1>{} + gradient(r.logit(c) - kept.lx));
}

// --- losses of one row of logits
// ------------------------------------------------------------------

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
  static void backward(const Row<T>& r, const Kept& kept, float g, T* d) {
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
  static void backward(const Row<T>& r, const Kept& kept, float g, T* d) {
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
  static void backward(const Row<T>& r, const Kept& kept, float g, T* d) {
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
  static void backward(const Row<T>& r, const Kept& kept, float g, T* d) {
    put_gradient(r, kept, d, [&](auto, auto lq) { return g * exp_of(lq); });
    each_given(r, kept, [&](auto c, float lp) {
      put_class(r, kept, d, c, [&](float lq) { return g * (expf(lq) - expf(lp)); });
    });
  }
  template <class T, class Body>
  static void each_given(const Row<T>& r, const Kept& kept, Body body) {
    for (int64_t i = 0; i < r.targets; ++i) body(r.y[i], Columns<1, 0>{i}.of(r.t)[0] - kept.lt);
  }
};

// --- losses of two rows of logits
// -----------------------------------------------------------------

struct Kl {
  template <class T>
  static Kept forward(const Row<T>& r) {
    const auto gap = [&](auto at, auto, auto, auto p) { return p * (at.of(r.t) - at.of(r.x)); };
    Kept kept = log_sum_exps(r, 0, 1, gap);
    kept.value = kept.more + kept.lx - kept.lt;
    return kept;
  }
  template <class T>
  static void backward(const Row<T>& r, const Kept& kept, float g, T* d) {
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
  static void backward(const Row<T>& r, const Kept& kept, float g, T* d) {
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
  static void backward(const Row<T>& r, const Kept& kept, float g, T* d) {
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
  static void backward(const Row<T>& r, const Kept& kept, float g, T* d) {
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

// --- what limit.py calls
// --------------------------------------------------------------------------

// Compute the forward of rows into `kept`; or, given d, the gradient of g times their sum from it.
template <class Loss, class T>
void run(Row<T> r, int64_t rows, Kept* kept, float g, T* d) {
  for (int64_t i = 0; i < rows; ++i) {
    if (d) {
      Loss::backward(r, kept[i], g, d + i * r.classes);
    } else {
      kept[i] = Loss::forward(r);
    }
    r.x += r.classes, r.t += r.targets, r.y += r.targets;
  }
}

}  // namespace

#define OF_DTYPE(name, dtype, T, ...)                                                           \
  extern "C" void name##_##dtype(const T* x, const T* t, const int64_t* y, int64_t rows,        \
                                 int64_t classes, int64_t targets, Kept* kept, float g, T* d) { \
    run<__VA_ARGS__>(Row<T>{x, t, y, classes, targets}, rows, kept, g, d);                      \
  }
#define LOSS(name, ...)                   \
  OF_DTYPE(name, f32, float, __VA_ARGS__) \
  OF_DTYPE(name, bf16, Bf16, __VA_ARGS__)

LOSS(cross_entropy, LogProbAndEntropy<-1, 0>)
LOSS(cross_entropy_smoothed, Smoothed)
LOSS(cross_entropy_of_probs, OfProbs)
LOSS(kl_div, Kl)
LOSS(reverse_kl_div, ReverseKl)
LOSS(js_div, Divergence<Js>)
LOSS(skew_kl_div, Divergence<SkewKl>)
LOSS(alpha_div, Powers<Of::alpha>)
LOSS(renyi_div, Powers<Of::renyi>)
LOSS(tv_distance, Divergence<Tv>)
LOSS(hellinger_distance, Powers<Of::hellinger>)
LOSS(topk_kl_div, TopkKl)
LOSS(entropy, LogProbAndEntropy<0, 100>)
LOSS(log_prob, LogProbAndEntropy<1, 0>)
LOSS(log_prob_and_entropy, LogProbAndEntropy<-1, -1>)
