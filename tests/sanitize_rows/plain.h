// Every loss of one row as plain loops in double.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "losses/row_args.h"

namespace fastdiv {

using Doubles = std::vector<double>;
constexpr double kInf = HUGE_VAL;
// Upstream gradients of the value and of the second output.
constexpr double kGrad = 1.5, kGradEntropy = -0.5;

struct Plain {
  double value = 0, entropy = 0;
  Doubles dx, dt;
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
                              const Doubles& lq, const Doubles& t) {
  const size_t n = lq.size();
  const bool hellinger = loss == "hellinger_distance", probs = target == Target::kProbs;
  const double b = hellinger ? 0.5 : a.params.param;
  Doubles lp = target == Target::kLogits ? log_softmax(t, a.scale) : t, p = t, u(n), v(n);
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
    if (target == Target::kLogits) out.dt[i] = kGrad * a.scale * (v[i] - p[i] * sum_v);
    if (target == Target::kLogProbs) out.dt[i] = kGrad * v[i];
    if (probs) out.dt[i] = p[i] == 0 ? 0 : kGrad * v[i] / p[i];
  }
  return out;
}

// Any loss without a top-k teacher, of the name without _stats.
inline Plain plain_row(const std::string& loss, Target target, const RowArgs& a, const Doubles& raw,
                       const Doubles& t, int64_t y, const Doubles& weight) {
  Doubles x = raw;
  if (a.softcap)
    for (double& v : x) v = a.softcap * std::tanh(v / a.softcap);
  const Doubles lq = log_softmax(x, a.scale);
  double lse = -kInf;
  for (size_t i = 0; i < x.size(); ++i) lse = std::fmax(lse, x[i] * a.scale - lq[i]);
  const bool cross = loss.find("cross_entropy") != std::string::npos;
  Plain out = cross ? plain_cross_entropy(a.params, lq, lse,
                                          target == Target::kNone ? Doubles{} : t, y, weight)
              : target == Target::kNone ? plain_entropy(loss != "entropy", lq, y)
                                        : plain_divergence(loss, target, a, lq, t);
  for (size_t i = 0; i < x.size(); ++i)
    out.dx[i] *= a.scale * (a.softcap ? 1 - std::pow(std::tanh(raw[i] / a.softcap), 2) : 1);
  return out;
}

// topk_kl_div: t holds what the teacher has for all classes.
inline Plain plain_topk(const std::string& loss, Target target, double scale, const Doubles& x,
                        const Doubles& t, const int64_t* indices, int64_t k) {
  const size_t n = x.size();
  const bool logits = target == Target::kLogits, probs = target == Target::kProbs;
  const bool normalised = logits || loss == "renormalized_topk_kl_div";
  const double others = double(n) - double(k);
  const Doubles lq = log_softmax(x, scale);
  Doubles p(k), slope(k);
  double sum = 0, mass = 0, common = 0, mean = 0;
  for (int64_t j = 0; j < k; ++j) {
    const double v = t[indices[j]];
    sum += p[j] = probs ? v : std::exp(logits ? v * scale : v);
  }
  Plain out{0, 0, Doubles(n), Doubles(k)};
  std::vector<bool> among_k(n);
  for (int64_t j = 0; j < k; ++j) {
    if (normalised) p[j] /= sum;
    const double q = lq[indices[j]], ratio = p[j] == 0 ? 0 : std::log(p[j]) - q;
    among_k[indices[j]] = true, mass += p[j], out.value += times(p[j], ratio);
    slope[j] = std::isinf(q) ? 0 : ratio + 1;
    if (normalised) common += times(p[j], slope[j]);
  }
  const bool uniform = loss == "uniform_topk_kl_div" && !normalised && others > 0;
  const double rest = uniform ? std::fmax(0, 1 - mass) : 0;
  for (size_t i = 0; i < n && uniform; ++i) mean += among_k[i] ? 0 : lq[i] / others;
  if (rest > 0) {
    out.value += rest * (std::log(rest / others) - mean);
    common = std::isinf(mean) ? 0 : std::log(rest / others) - mean + 1;
  }
  for (size_t i = 0; i < n; ++i)
    out.dx[i] = kGrad * scale * (std::exp(lq[i]) * (mass + rest) - (uniform ? rest / others : 0));
  for (int64_t j = 0; j < k; ++j) {
    const double over_common = slope[j] - common;
    out.dx[indices[j]] = kGrad * scale * (std::exp(lq[indices[j]]) * (mass + rest) - p[j]);
    out.dt[j] = kGrad * (logits ? scale : 1) * times(p[j], over_common);
    if (probs) out.dt[j] = p[j] == 0 ? 0 : kGrad * over_common / (normalised ? sum : 1);
  }
  return out;
}

}  // namespace fastdiv
