// Every loss of one row as plain loops in double.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "losses/named.h"

namespace fastdiv {

using Doubles = std::vector<double>;
constexpr double kInf = HUGE_VAL;
// Upstream gradients of the value and of the second output.
constexpr double kGrad = 1.5, kGradEntropy = -0.5;

struct Plain {
  double value = 0, entropy = 0;
  Doubles dx, dt;
  Doubles values;  // of named classes
};

// A row and its options.
struct PlainCall {
  const RowArgs& a;
  Doubles x, t;
  int64_t y;
  const Doubles& weight;
  double scale = 1;
  std::vector<bool> part = {};  // whether each class takes part
};

inline double times(double mass, double v) { return mass == 0 ? 0 : mass * v; }

inline Doubles log_softmax(Doubles x, double scale) {
  double max = -kInf, sum = 0;
  for (double& v : x) max = std::fmax(max, v *= scale);
  for (double v : x) sum += std::exp(v - max);
  for (double& v : x) v -= max + std::log(sum);
  return x;
}
inline double entropy_of(const Doubles& lq) {
  double entropy = 0;
  for (double v : lq) entropy -= times(std::exp(v), v);
  return entropy;
}

// The functions below take log q and return dx without scale and softcap.

// t holds probabilities, or is empty for the label y.
inline Plain plain_cross_entropy(const LossParams& params, const Doubles& lq, double lse,
                                 const Doubles& t, int64_t y, const Doubles& weight) {
  const size_t n = lq.size();
  const bool hard = t.empty();
  const double z_factor = params.z_loss * (hard ? weight[y] : 1);
  Doubles r(n);
  double mass = 0;
  Plain out{z_factor * lse * lse, entropy_of(lq), Doubles(n), Doubles(n)};
  for (size_t i = 0; i < n; ++i) {
    const double p = hard ? double(int64_t(i) == y) : t[i];
    r[i] = weight[i] * (params.confidence * p + params.smoothing_per_class);
    mass += r[i], out.value -= times(r[i], lq[i]);
    out.dt[i] = -kGrad * weight[i] * params.confidence * lq[i];
  }
  for (size_t i = 0; i < n; ++i)
    out.dx[i] = kGrad * (times(std::exp(lq[i]), mass + 2 * z_factor * lse) - r[i]);
  return out;
}

// entropy, or log_prob_and_entropy with the label y.
inline Plain plain_entropy(bool with_log_prob, const Doubles& lq, int64_t y) {
  const double entropy = entropy_of(lq);
  Plain out{with_log_prob ? lq[y] : entropy, entropy, Doubles(lq.size()), {}};
  for (size_t i = 0; i < lq.size(); ++i) {
    const double q = std::exp(lq[i]), slope = -times(q, lq[i] + entropy);
    out.dx[i] = kGrad * slope;
    if (with_log_prob) out.dx[i] = kGrad * ((int64_t(i) == y) - q) + kGradEntropy * slope;
  }
  return out;
}

// Those that are sums of terms f(q, p): u = q df/dq and v = p df/dp, without kappa (q - p).
struct PlainTerms {
  double f = 0, u = 0, v = 0;
};
inline PlainTerms plain_terms(const std::string& loss, double b, double lq, double lp, double p) {
  const double q = std::exp(lq);
  const double forward = p == 0 ? 0 : p * (lp - lq), reverse = q == 0 ? 0 : q * (lq - lp);
  if (loss == "kl_div") return {forward, -p, forward + p};
  if (loss == "reverse_kl_div") return {reverse, reverse + q, -q};
  if (loss == "js_div") {
    const double m = std::log(b * p + (1 - b) * q);
    const double u = (1 - b) * (q == 0 ? 0 : q * (lq - m)), v = b * (p == 0 ? 0 : p * (lp - m));
    return {u + v, u, v};
  }
  if (loss == "tv_distance") {
    const double sign = p > q ? 0.5 : (p < q ? -0.5 : 0);
    return {sign * (p - q), -sign * q, sign * p};
  }
  // Reversed, q and p are exchanged.
  const bool reversed = loss == "reverse_skew_kl_div";
  if (!reversed && loss != "skew_kl_div") {
    std::printf("plain_terms lacks a formula for %s\n", loss.c_str());
    std::exit(1);
  }
  const double first = reversed ? q : p, second = reversed ? p : q;
  const double m = b * first + (1 - b) * second;
  if (m == 0) return {};
  const double log = first == 0 ? 0 : std::log(first / m);
  const double of_second = -(1 - b) * first * second / m;
  const double of_first = first * (log + (1 - b) * second / m);
  return {first * log, reversed ? of_first : of_second, reversed ? of_second : of_first};
}

// The divergences of order alpha are functions of S = sum p^alpha q^(1 - alpha).
inline bool has_order(const std::string& loss) {
  return loss == "alpha_div" || loss == "renyi_div" || loss == "hellinger_distance";
}

inline Plain plain_divergence(const std::string& loss, Target target, const RowArgs& a,
                              double scale, const Doubles& lq, const Doubles& t) {
  const size_t n = lq.size();
  const bool hellinger = loss == "hellinger_distance", probs = target == Target::kProbs;
  const double b = hellinger ? 0.5 : a.params.param;
  Doubles lp = target == Target::kLogits ? log_softmax(t, scale) : t, p = t, u(n), v(n);
  for (size_t i = 0; i < n; ++i) probs ? lp[i] = std::log(t[i]) : p[i] = std::exp(lp[i]);
  Plain out{0, entropy_of(lq), Doubles(n), Doubles(n)};
  double s = 0, sum_u = 0, sum_v = 0;
  for (size_t i = 0; i < n; ++i) s += std::exp(b * lp[i] + (1 - b) * lq[i]);
  const double slope = loss == "renyi_div" ? 1 / ((b - 1) * s) : hellinger ? -1 : 1 / (b * (b - 1));
  for (size_t i = 0; i < n; ++i) {
    if (has_order(loss)) {
      const double w = slope * std::exp(b * lp[i] + (1 - b) * lq[i]);
      u[i] = (1 - b) * w, v[i] = b * w;
      if (hellinger) out.value += (std::exp(lq[i]) + p[i]) / 2 + w, v[i] += p[i] / 2;
    } else {
      const PlainTerms terms = plain_terms(loss, b, lq[i], lp[i], p[i]);
      out.value += terms.f, u[i] = terms.u, v[i] = terms.v;
    }
    sum_u += u[i], sum_v += v[i];
  }
  if (loss == "alpha_div") out.value = (s - 1) * slope;
  if (loss == "renyi_div") out.value = std::log(s) / (b - 1);
  for (size_t i = 0; i < n; ++i) {
    out.dx[i] = kGrad * (u[i] - times(std::exp(lq[i]), sum_u));
    if (target == Target::kLogits) out.dt[i] = kGrad * scale * (v[i] - p[i] * sum_v);
    if (target == Target::kLogProbs) out.dt[i] = kGrad * v[i];
    if (probs) out.dt[i] = p[i] == 0 ? 0 : kGrad * v[i] / p[i];
  }
  return out;
}

// Return the logits after soft capping and masking.
inline Doubles plain_logits(const PlainCall& c) {
  Doubles x = c.x;
  for (size_t i = 0; i < x.size(); ++i) {
    if (c.a.softcap) x[i] = c.a.softcap * std::tanh(x[i] / c.a.softcap);
    if (!c.part[i]) x[i] = -kInf;
  }
  return x;
}
// Scale the gradients of logits, and set those of classes that take no part to 0.
inline void finish_gradients(Plain& out, const PlainCall& c) {
  for (size_t i = 0; i < c.x.size(); ++i) {
    const double slope = c.a.softcap ? 1 - std::pow(std::tanh(c.x[i] / c.a.softcap), 2) : 1;
    out.dx[i] = c.part[i] ? out.dx[i] * c.scale * slope : 0;
    if (!c.part[i] && !out.dt.empty()) out.dt[i] = 0;
  }
}

// Any loss without named classes, of the name without _stats.
inline Plain plain_row(const std::string& loss, Target target, const PlainCall& c) {
  const Doubles x = plain_logits(c), lq = log_softmax(x, c.scale);
  Doubles t = c.t;
  for (size_t i = 0; i < t.size(); ++i)
    if (!c.part[i]) t[i] = target == Target::kProbs ? 0 : -kInf;
  double lse = -kInf;
  for (size_t i = 0; i < x.size(); ++i)
    if (c.part[i]) lse = std::fmax(lse, x[i] * c.scale - lq[i]);
  const bool cross = loss.find("cross_entropy") != std::string::npos;
  const bool hard = target == Target::kNone;
  Plain out = cross  ? plain_cross_entropy(c.a.params, lq, lse, hard ? Doubles{} : t, c.y, c.weight)
              : hard ? plain_entropy(loss != "entropy", lq, c.y)
                     : plain_divergence(loss, target, c.a, c.scale, lq, t);
  if (c.a.params.by_probability) {
    const double own = std::exp(lq[size_t(c.y)]);
    out.value *= own;
    for (double& d : out.dx) d *= own;
  }
  finish_gradients(out, c);
  return out;
}

// The log-probabilities of k named classes, and of the rest.
inline Plain plain_named(const PlainCall& c, Rest rest, const int64_t* indices, int64_t k,
                         const Doubles& upstream) {
  const size_t n = c.x.size();
  const Doubles lq = log_softmax(plain_logits(c), c.scale);
  Plain out{0, 0, Doubles(n), {}, Doubles(upstream.size())};
  std::vector<bool> named(n);
  double sum = 0, tail = 0, mean = 0, others = double(n);
  for (int64_t j = 0; j < k; ++j) {
    if (indices[j] < 0) continue;
    const size_t y = size_t(indices[j]);
    others -= !named[y], named[y] = true;
    out.values[j] = lq[y], out.dx[y] += upstream[j], sum += upstream[j];
  }
  for (size_t i = 0; i < n; ++i)
    if (!named[i]) tail += std::exp(lq[i]), mean += lq[i] / others;
  if (rest != Rest::kNone) {
    const double g = upstream[k];
    out.values[k] = rest == Rest::kTail ? std::log(tail) : mean, sum += g;
    for (size_t i = 0; i < n; ++i)
      if (!named[i])
        out.dx[i] += g * (rest == Rest::kTail ? times(std::exp(lq[i]), 1 / tail) : 1 / others);
  }
  for (size_t i = 0; i < n; ++i) out.dx[i] -= times(std::exp(lq[i]), sum);
  finish_gradients(out, c);
  return out;
}

}  // namespace fastdiv
