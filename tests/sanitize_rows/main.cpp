// Every kernel without torch, on buffers of exactly the right size, against plain loops in double:
// those of the CPU or, with FD_CUDA_ON_CPU, those of CUDA.  Built and run by test_sanitizers.py and
// test_cuda_kernels.py; the argument is one dtype of all (f32, f64, f16, bf16), or "shared": only
// what threads share, and nothing is compared.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "common/dtype.h"
#include "cpu/kernels.h"
#include "cuda/kernels.h"

using namespace fastdiv;

#if defined(FD_CUDA_ON_CPU)
// Of dtypes whose kernels the program is not linked with, for the time it takes to compile them.
namespace fastdiv {
namespace cuda {
__attribute__((weak)) const RowKernels* find_f64(LossId, Target) { return nullptr; }
__attribute__((weak)) const RowKernels* find_f16(LossId, Target) { return nullptr; }
__attribute__((weak)) const RowKernels* find_bf16(LossId, Target) { return nullptr; }
}  // namespace cuda
}  // namespace fastdiv
#endif

namespace {

constexpr double kInf = HUGE_VAL;
bool compare = true;  // with plain loops, not only split against whole
int checks = 0, failures = 0;
std::string context;

// Of a value that a kernel computed from numbers of this size.
void expect(const char* what, double got, double expected, double tolerance) {
  ++checks;
  const bool same = got == expected || (std::isnan(got) && std::isnan(expected)) ||
                    std::abs(got - expected) <= tolerance;
  if (same || ++failures > 20) return;
  std::printf("%s: %s is %.9g, expected %.9g\n", context.c_str(), what, got, expected);
}

// --- memory of the exact size
// -----------------------------------------------------------------------

struct RowBuffer {
  DType dtype;
  int64_t rows, classes, stride;
  std::vector<char> bytes;  // ends with the last element of the last row

  RowBuffer(DType d, int64_t r, int64_t c, int64_t padding)
      : dtype(d),
        rows(r),
        classes(c),
        stride(c + padding),
        bytes(((r - 1) * stride + c) * size_of(d)) {
    bytes.shrink_to_fit();
  }
  Matrix matrix() { return {bytes.data(), stride}; }
  void set(int64_t r, int64_t i, double v) {
    char* p = bytes.data() + (r * stride + i) * size_of(dtype);
    if (dtype == DType::kF64) *reinterpret_cast<double*>(p) = v;
    if (dtype == DType::kF32) *reinterpret_cast<float*>(p) = float(v);
    if (dtype == DType::kF16) narrow(float(v), reinterpret_cast<Half*>(p));
    if (dtype == DType::kBF16) narrow(float(v), reinterpret_cast<BFloat16*>(p));
  }
  double get(int64_t r, int64_t i) const {
    const char* p = bytes.data() + (r * stride + i) * size_of(dtype);
    if (dtype == DType::kF64) return *reinterpret_cast<const double*>(p);
    if (dtype == DType::kF32) return double(*reinterpret_cast<const float*>(p));
    return dtype == DType::kF16 ? double(widen(*reinterpret_cast<const Half*>(p)))
                                : double(widen(*reinterpret_cast<const BFloat16*>(p)));
  }
  // The same numbers; of NaN, any.
  bool same(const RowBuffer& o) const {
    if (bytes == o.bytes) return true;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < classes; ++i) {
        const double a = get(r, i), b = o.get(r, i);
        if (a != b && !(std::isnan(a) && std::isnan(b))) return false;
      }
    return true;
  }
};

// Numbers of the type we compute in.
struct Reals {
  bool f64;
  std::vector<char> bytes;
  Reals(bool d, int64_t n, double v) : f64(d), bytes(size_t(n * (d ? 8 : 4))) {
    for (int64_t i = 0; i < n; ++i) set(i, v);
  }
  void* data() { return bytes.data(); }
  void set(int64_t i, double v) {
    if (f64)
      reinterpret_cast<double*>(bytes.data())[i] = v;
    else
      reinterpret_cast<float*>(bytes.data())[i] = float(v);
  }
  double operator[](int64_t i) const {
    return f64 ? reinterpret_cast<const double*>(bytes.data())[i]
               : double(reinterpret_cast<const float*>(bytes.data())[i]);
  }
};

// --- plain loops
// ------------------------------------------------------------------------------------

struct Plain {
  double value = 0, entropy = 0;
  std::vector<double> dx, dt;
};

double times(double mass, double v) { return mass == 0 ? 0 : mass * v; }

std::vector<double> log_softmax(std::vector<double> x, double scale) {
  double max = -kInf, sum = 0;
  for (double& v : x) max = std::fmax(max, v *= scale);
  for (double v : x) sum += std::exp(v - max);
  for (double& v : x) v -= max + std::log(sum);
  return x;
}

// One row of the loss, with upstream gradients 1.5 of the value and -0.5 of the entropy.
Plain plain_row(const std::string& loss, Target target, const RowArgs& a, std::vector<double> x,
                const std::vector<double>& t, int64_t y, const std::vector<double>& weight) {
  const size_t n = x.size();
  const std::vector<double> raw = x;
  if (a.softcap)
    for (double& v : x) v = a.softcap * std::tanh(v / a.softcap);
  const std::vector<double> lq = log_softmax(x, a.scale);
  std::vector<double> lp(n), p(n), u(n), v(n), ux(n);
  for (size_t i = 0; i < n; ++i) lp[i] = target == Target::kProbs ? std::log(t[i]) : t[i];
  if (target == Target::kLogits) lp = log_softmax(t, a.scale);
  for (size_t i = 0; i < n; ++i) p[i] = target == Target::kProbs ? t[i] : std::exp(lp[i]);
  double lse = -kInf, entropy = 0, mass = 0, terms = 0, sum_u = 0;
  for (size_t i = 0; i < n; ++i) lse = std::fmax(lse, x[i] * a.scale - lq[i]);
  for (size_t i = 0; i < n; ++i) entropy -= times(std::exp(lq[i]), lq[i]);
  Plain out{0, entropy, std::vector<double>(n), std::vector<double>(n)};
  const double b = loss == "hellinger_distance" ? 0.5 : a.params.param;
  const bool cross = loss.find("cross_entropy") != std::string::npos,
             hard = target == Target::kNone;
  const double omega = hard && cross ? weight[y] : 1;
  // Of order alpha: the value, and the factor of p^alpha q^(1-alpha), are functions of its sum.
  const bool renyi = loss == "renyi_div", hellinger = loss == "hellinger_distance";
  const bool order = loss == "alpha_div" || renyi || hellinger;
  double tilted = 0;
  for (size_t i = 0; i < n; ++i) tilted += std::exp(b * lp[i] + (1 - b) * lq[i]);
  const double slope_of_tilted = renyi       ? 1 / ((b - 1) * tilted)
                                 : hellinger ? -1
                                             : 1 / (b * (b - 1));
  for (size_t i = 0; i < n; ++i) {
    const double q = std::exp(lq[i]), m = std::log(b * p[i] + (1 - b) * q);
    const double forward = p[i] == 0 ? 0 : lp[i] - lq[i], reverse = q == 0 ? 0 : lq[i] - lp[i];
    if (loss == "kl_div")
      terms += times(p[i], forward), u[i] = -p[i], v[i] = times(p[i], forward) + p[i];
    if (loss == "reverse_kl_div")
      terms += times(q, reverse), u[i] = times(q, reverse) + q, v[i] = -q;
    if (loss == "js_div") {
      u[i] = (1 - b) * (q == 0 ? 0 : q * (lq[i] - m)),
      v[i] = b * (p[i] == 0 ? 0 : p[i] * (lp[i] - m));
      terms += u[i] + v[i];
    }
    if (loss == "skew_kl_div" || loss == "reverse_skew_kl_div") {
      const bool reversed = loss[0] == 'r';
      const double first = reversed ? q : p[i], second = reversed ? p[i] : q;
      const double m_skew = b * first + (1 - b) * second;
      if (m_skew == 0) continue;
      const double log = first == 0 ? 0 : std::log(first / m_skew);
      terms += first * log;
      (reversed ? v : u)[i] = -(1 - b) * first * second / m_skew;
      (reversed ? u : v)[i] = first * (log + (1 - b) * second / m_skew);
    }
    if (order) {
      const double w = slope_of_tilted * std::exp(b * lp[i] + (1 - b) * lq[i]);
      u[i] = (1 - b) * w, v[i] = b * w;
      if (hellinger) terms += (q + p[i]) / 2 + w, v[i] += p[i] / 2;
    }
    if (loss == "tv_distance") {
      const double sign = p[i] > q ? 0.5 : (p[i] < q ? -0.5 : 0);
      terms += sign * (p[i] - q), u[i] = -sign * q, v[i] = sign * p[i];
    }
    if (cross) {
      const bool at = hard && int64_t(i) == y;
      const double r = weight[i] * (hard ? at * a.params.confidence : a.params.confidence * p[i]) +
                       weight[i] * a.params.smoothing_per_class;
      mass += r, terms -= times(r, lq[i]), u[i] = -r;
      v[i] = -weight[i] * a.params.confidence * times(1, lq[i]);
    }
    if (loss == "entropy") u[i] = -1.5 * times(q, lq[i] + entropy);
    if (loss == "log_prob_and_entropy")
      u[i] = 1.5 * ((int64_t(i) == y) - q) + 0.5 * times(q, lq[i] + entropy);
    sum_u += u[i];
  }
  out.value = terms;
  if (loss == "alpha_div") out.value = (tilted - 1) * slope_of_tilted;
  if (renyi) out.value = std::log(tilted) / (b - 1);
  if (cross) out.value += a.params.z_loss * omega * lse * lse;
  if (loss == "entropy") out.value = entropy;
  if (loss == "log_prob_and_entropy") out.value = lq[y];
  double sum_v = 0;
  for (size_t i = 0; i < n; ++i) sum_v += v[i];
  for (size_t i = 0; i < n; ++i) {
    const double q = std::exp(lq[i]),
                 slope = a.softcap ? 1 - std::pow(std::tanh(raw[i] / a.softcap), 2) : 1;
    const double pull = cross ? mass + 2 * a.params.z_loss * omega * lse : -sum_u;
    const bool complete = !cross && target == Target::kNone;
    out.dx[i] = (complete ? u[i] : 1.5 * (u[i] + times(q, pull))) * a.scale * slope;
    if (target == Target::kLogits) out.dt[i] = 1.5 * a.scale * (v[i] - p[i] * sum_v);
    if (target == Target::kLogProbs) out.dt[i] = 1.5 * v[i];
    if (target == Target::kProbs) out.dt[i] = 1.5 * (cross ? v[i] : p[i] == 0 ? 0 : v[i] / p[i]);
  }
  return out;
}

// One row of topk_kl_div, likewise: t holds what the teacher has for all classes.
Plain plain_topk(const std::string& loss, Target target, double scale, const std::vector<double>& x,
                 const std::vector<double>& t, const int64_t* indices, int64_t k) {
  const size_t n = x.size();
  const bool logits = target == Target::kLogits, probs = target == Target::kProbs;
  const bool normalised = logits || loss == "renormalized_topk_kl_div";
  const double others = double(n) - double(k);
  const std::vector<double> lq = log_softmax(x, scale);
  std::vector<double> p(k), slope(k);
  double sum = 0, mass = 0, common = 0, mean = 0;
  for (int64_t j = 0; j < k; ++j) {
    const double v = t[indices[j]];
    sum += p[j] = probs ? v : std::exp(logits ? v * scale : v);
  }
  Plain out{0, 0, std::vector<double>(n), std::vector<double>(k)};
  std::vector<bool> among_k(n);
  for (int64_t j = 0; j < k; ++j) {
    if (normalised) p[j] /= sum;
    const double q = lq[indices[j]], ratio = p[j] == 0 ? 0 : std::log(p[j]) - q;
    among_k[indices[j]] = true, mass += p[j], out.value += times(p[j], ratio);
    slope[j] = std::isinf(q) ? 0 : ratio + 1;
    if (normalised) common += times(p[j], slope[j]);
  }
  const double rest = std::fmax(0, 1 - mass);
  const bool uniform = loss == "uniform_topk_kl_div" && !normalised && others > 0;
  for (size_t i = 0; i < n && uniform; ++i) mean += among_k[i] ? 0 : lq[i] / others;
  if (uniform && rest > 0) {
    out.value += rest * (std::log(rest / others) - mean);
    common = std::isinf(mean) ? 0 : std::log(rest / others) - mean + 1;
  }
  for (size_t i = 0; i < n; ++i) {
    const double all = mass + (uniform ? rest : 0);
    out.dx[i] = 1.5 * scale * (std::exp(lq[i]) * all - (uniform ? rest / others : 0));
  }
  for (int64_t j = 0; j < k; ++j) {
    const double all = mass + (uniform ? rest : 0), over_common = slope[j] - common;
    out.dx[indices[j]] = 1.5 * scale * (std::exp(lq[indices[j]]) * all - p[j]);
    out.dt[j] = 1.5 * (logits ? scale : 1) * times(p[j], over_common);
    if (probs) out.dt[j] = p[j] == 0 ? 0 : 1.5 * over_common / (normalised ? sum : 1);
  }
  return out;
}

// --- one problem
// ------------------------------------------------------------------------------------

void three_threads(int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*),
                   void* context) {
  const int64_t third = (end - begin + 2) / 3;
  std::vector<std::thread> threads;
  for (int64_t i = begin; i < end; i += third)
    threads.emplace_back(body, i, i + third < end ? i + third : end, context);
  for (std::thread& t : threads) t.join();
}

#if defined(FD_CUDA_ON_CPU)
const cuda::RowKernels* find(LossId loss, Target target, DType dtype) {
  return cuda::find_kernels(loss, target, dtype);
}
void call(cuda::RowKernel kernel, const RowArgs& a) {
  cuda::Gpu gpu;
  if (cuda::describe(0, &gpu) || kernel(a, gpu, nullptr)) std::abort();
}
// A warp a row, a block of 128 and of 256 threads, clusters of two and more.
const std::vector<int64_t> kClasses = {1, 7, 257, 513, 1027, 8193}, kShared = {257, 1027, 8197};
constexpr bool kSplits = false;  // a team shares every row
#else
const RowKernels* find(LossId loss, Target target, DType dtype) {
  return baseline::find_kernels(loss, target, dtype == DType::kF64);
}
void call(RowKernel kernel, const RowArgs& a) { kernel(a, 0, a.rows); }
// Around a tile and a segment; several segments.
const std::vector<int64_t> kClasses = {1, 7, 511, 512, 513, 8193}, kShared = {8193, 16385};
constexpr bool kSplits = true;
#endif

struct Setup {
  double scale = 1, softcap = 0;
  bool weights = false;
  int64_t padding = 0;  // between rows
};

void run(LossId loss, Target target, DType dtype, int64_t classes, Setup o, bool split) {
  const bool f64 = dtype == DType::kF64;
  const auto* kernels = find(loss, target, dtype);
  if (!kernels) return;
  const LossTraits traits = kernels->traits;
  if (!traits.softcap) o.softcap = 0;
  const std::string name = kLossNames[int(loss)], plain_name = name.substr(0, name.find("_stats"));
  context = name + " target " + std::to_string(int(target)) + " dtype " +
            std::to_string(int(dtype)) + " classes " + std::to_string(classes);
  // Rows: ordinary, close to the target, a class at -inf on both sides, NaN, ignored.
  const int64_t kRows = compare ? 5 : 2;
  std::mt19937 random(1);
  std::normal_distribution<double> normal(0, 2);
  const int64_t k = classes > 2 ? classes / 3 : 1;
  RowBuffer x(dtype, kRows, classes, o.padding),
      t(dtype, kRows, traits.topk ? k : classes, o.padding);
  std::vector<int64_t> indices(kRows * k);
  std::vector<std::vector<double>> dense;  // what the teacher has for all classes
  for (int64_t r = 0; r < kRows; ++r) {
    std::vector<double> logits(classes), teacher(classes);
    for (int64_t i = 0; i < classes; ++i) logits[i] = normal(random), teacher[i] = normal(random);
    if (r == 1)
      for (int64_t i = 0; i < classes; ++i) teacher[i] = logits[i] + 0.01 * teacher[i];
    if (r == 2 && classes > 2 && o.softcap == 0) logits[classes - 1] = teacher[classes - 1] = -kInf;
    if (r >= 3) logits[classes / 2] = teacher[0] = NAN;
    if (target != Target::kLogits) teacher = log_softmax(teacher, 1);
    for (int64_t i = 0; i < classes; ++i) {
      x.set(r, i, logits[i]);
      // No smaller than what a half and the reciprocals in the gradients can hold.
      const double p = teacher[i] == -kInf ? 0 : std::fmax(std::exp(teacher[i]), 1e-3);
      if (target == Target::kProbs && teacher[i] == teacher[i]) teacher[i] = p;
      if (!traits.topk) t.set(r, i, teacher[i]);
    }
    for (int64_t j = 0; j < k && traits.topk; ++j) {
      const int64_t y = indices[r * k + j] = (3 * j + r) % classes;
      t.set(r, j, teacher[y]);
      teacher[y] = t.get(r, j);
      if (r == 4) indices[r * k + j] = j % 2 ? -1 : INT64_MAX;  // of a row that does not count
    }
    dense.push_back(teacher);
  }
  std::vector<int64_t> labels(kRows), argmax(kRows);
  for (int64_t r = 0; r < kRows; ++r)
    labels[r] = r == 4 ? -100 : (r * 7) % (classes > 2 ? classes - 1 : 1);
  Reals weight(f64, classes, 1), row_weight(f64, kRows, 1), value(f64, kRows, 777),
      entropy = value, record(f64, kRows * 8, 777), stats(f64, 3 * kRows, 777),
      grad(f64, kRows, 1.5), grad_entropy(f64, kRows, -0.5);
  std::vector<double> class_weight(classes, 1.0);
  if (o.weights)
    for (int64_t i = 0; i < classes; ++i)
      weight.set(i, 0.5 + double(i % 4)), class_weight[i] = 0.5 + double(i % 4);
  row_weight.set(4, 0);
  std::vector<char> scratch(segment_count(classes) * kScratchPerSegment);
  RowArgs a;
  a.rows = kRows, a.classes = classes, a.dtype = dtype;
  a.x = x.matrix();
  if (target != Target::kNone) a.t = t.matrix();
  if (traits.reads_label) a.labels = labels.data(), a.ignore_index = -100;
  if (o.weights) a.class_weight = weight.data();
  a.row_weight = row_weight.data();
  a.scale = o.scale, a.softcap = o.softcap;
  a.params = {loss, 0.3, 1, 0, 0, target};
  if (traits.topk) a.k = k, a.t_dtype = dtype, a.indices = {indices.data(), k};
  const bool cross = plain_name.find("cross_entropy") != std::string::npos;
  if (cross) a.params.z_loss = 1e-2;
  if (plain_name == "smoothed_cross_entropy" || plain_name == "soft_cross_entropy")
    a.params.confidence = 0.9, a.params.smoothing_per_class = 0.1 / double(classes);
  a.value = value.data(), a.record = record.data();
  a.grad = grad.data(), a.grad_stride = 1;
  if (traits.two_outputs) a.entropy = entropy.data(), a.grad_entropy = grad_entropy.data();
  if (traits.stats) a.stats = stats.data(), a.argmax = argmax.data();
  if (split) a.split_columns = three_threads, a.scratch = scratch.data();

  RowBuffer dx = x, dt = t;
  a.dx = dx.matrix();
  if (target != Target::kNone) a.dt = dt.matrix();
  call(kernels->forward, a);
  if (!traits.stats) call(kernels->backward, a);

  // Both at once, in place, without threads: the same bits.
  RowBuffer over = x, dt_again = t;
  Reals value_again(f64, kRows, 555), record_again(f64, kRows * 8, 555);
  Reals overwritten(f64, kRows * k, 555);
  RowArgs f = a;
  if (traits.topk) f.overwritten = overwritten.data();
  f.split_columns = nullptr, f.scratch = nullptr;
  f.x = f.dx = over.matrix();
  if (target != Target::kNone) f.dt = dt_again.matrix();
  f.value = value_again.data(), f.record = record_again.data();
  if (!traits.stats) {
    call(kernels->forward_grad, f);
    expect("forward_grad's value", value.bytes == value_again.bytes, 1, 0);
    expect("forward_grad's gradient", dx.same(over), 1, 0);
    expect("forward_grad's target gradient", dt.same(dt_again), 1, 0);
  }

  if (!compare) return;
  const double digits = f64 ? 1e-11 : 2e-5;
  const double stored = dtype == DType::kBF16 ? 8e-3 : (dtype == DType::kF16 ? 1e-3 : digits);
  for (int64_t r = 0; r < kRows; ++r) {
    std::vector<double> row(classes), teacher(classes);
    for (int64_t i = 0; i < classes; ++i) {
      row[i] = x.get(r, i);
      teacher[i] = traits.topk ? dense[r][i] : t.get(r, i);
    }
    Plain e{0, 0, std::vector<double>(classes, 0.0), std::vector<double>(t.classes, 0.0)};
    if (r < 4 && traits.topk)
      e = plain_topk(name, target, a.scale, row, teacher, &indices[r * k], k);
    else if (r < 4)
      e = plain_row(plain_name, target, a, row, teacher, labels[r], class_weight);
    if (r == 3) e.value = e.entropy = NAN;
    expect("value", value[r], e.value, digits * (10 + std::abs(e.value)));
    if (traits.two_outputs) expect("second output", entropy[r], e.entropy, digits * 20);
    if (traits.stats && r < 3) expect("entropy", stats[kRows + r], e.entropy, digits * 20);
    if (traits.stats && r < 3)
      for (int64_t i = 0; i < classes; ++i)
        expect("maximum", x.get(r, argmax[r]) >= x.get(r, i), 1, 0);
    if (r == 3) continue;  // NaN: no promise for the gradient
    for (int64_t i = 0; i < classes && !traits.stats; ++i)
      expect("dx", dx.get(r, i), e.dx[i], stored * (1e-2 + std::abs(e.dx[i])) + digits);
    for (int64_t i = 0; i < t.classes && target != Target::kNone && !traits.stats; ++i)
      expect("dt", dt.get(r, i), e.dt[i], stored * (1e-2 + std::abs(e.dt[i])) + 5 * digits);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string only = argc > 1 ? argv[1] : "";
  compare = only != "shared";
  const std::vector<std::string> names = {"f32", "f64", "f16", "bf16"};
  for (int loss = 0; loss < int(LossId::kCount); ++loss)
    for (Target target : {Target::kNone, Target::kLogits, Target::kLogProbs, Target::kProbs})
      for (DType dtype : {DType::kF32, DType::kF64, DType::kF16, DType::kBF16}) {
        // What is shared is the same for all dtypes.
        if (!only.empty() && names[size_t(dtype)] != (compare ? only : "f32")) continue;
        // On a CPU halves have the kernels of float, which read them a tile at a time.
        const bool own = !kSplits || size_of(dtype) > 2;
        for (int64_t classes : kShared)
          if ((kSplits && own) || !compare) run(LossId(loss), target, dtype, classes, {}, true);
        if (!compare) continue;
        for (int64_t classes : kClasses)
          if (own || classes < 8193) run(LossId(loss), target, dtype, classes, {}, false);
        run(LossId(loss), target, dtype, 513, {0.5, 30, true, 3}, false);
        run(LossId(loss), target, dtype, 8197, {0.5, 30, true, 1}, true);
      }
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures ? 1 : 0;
}
