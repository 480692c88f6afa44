// One call of the kernels of a loss: its inputs, and the checks of its outputs.
#pragma once

#include <cstdio>
#include <random>

#include "kernels.h"
#include "losses/named.h"
#include "memory.h"
#include "plain.h"

namespace fastdiv {

enum class Masks { kNone, kBytes, kBits };

struct Setup {
  double scale = 1, softcap = 0;
  bool weights = false;
  int64_t padding = 0;  // elements between rows
  Masks masks = Masks::kNone;
  bool own_scales = false;  // a scale for each row
};

// Counts checks and failures, and prints the first failures.
struct Report {
  int checks = 0, failures = 0;

  void expect(const std::string& context, const char* what, double got, double expected,
              double tolerance) {
    ++checks;
    const bool same = got == expected || (std::isnan(got) && std::isnan(expected)) ||
                      std::abs(got - expected) <= tolerance;
    if (same || ++failures > 20) return;
    std::printf("%s: %s is %.9g, expected %.9g\n", context.c_str(), what, got, expected);
  }
};

template <class Kernels>
class Problem {
 public:
  Problem(const Kernels& kernels, LossId loss, Target target, DType dtype, int64_t classes,
          Setup setup, bool split, int64_t rows, Report& report)
      : kernels(kernels),
        traits(kernels.traits),
        name(kLossNames[int(loss)]),
        target(target),
        dtype(dtype),
        rows(rows),
        classes(classes),
        once(traits.named && names_once(loss)),
        k(classes > 2 ? classes / 3 : 1),
        values(traits.named ? k + (rest_of(loss) != Rest::kNone) : 1),
        setup(setup),
        report(report) {
    if (!traits.softcap) this->setup.softcap = 0;
    fill();
    dx = x, dt = t;  // what a kernel does not write, compares equal
    set_arguments(loss, split);
  }

  void run() {
    call(kernels.forward, a);
    if (!traits.stats) call(kernels.backward, a);
  }

  // A backward of named classes writes the same in place.
  void check_in_place() {
    if (!traits.named) return;
    RowBuffer over = x;
    Reals overwritten(f64, rows * k, 555);
    RowArgs b = a;
    b.x = b.dx = over.matrix(), b.overwritten = overwritten.data();
    b.split_columns = nullptr, b.scratch = nullptr;
    call(kernels.backward, b);
    expect("the gradient in place", dx.same(over), 1, 0);
  }

  // Both kernels in one, in place and without threads, give the same bits.
  void check_forward_grad() {
    if (traits.stats || traits.named) return;
    RowBuffer over = x, dt_again = t;
    Reals value_again(f64, rows, 555), record_again(f64, rows * 8, 555);
    RowArgs f = a;
    f.split_columns = nullptr, f.scratch = nullptr;
    f.x = f.dx = over.matrix();
    if (target != Target::kNone) f.dt = dt_again.matrix();
    f.value = value_again.data(), f.record = record_again.data();
    call(kernels.forward_grad, f);
    expect("forward_grad's value", value.same(value_again), 1, 0);
    expect("forward_grad's gradient", dx.same(over), 1, 0);
    expect("forward_grad's target gradient", dt.same(dt_again), 1, 0);
  }

  void check_against_plain_loops() {
    for (int64_t r = 0; r < rows; ++r) {
      const Plain plain = plain_of(r);
      check_value(r, plain);
      if (r != kNaN && !traits.stats) check_gradients(r, plain);  // that of a NaN may be anything
    }
  }

 private:
  // What each row is: the classes of a masked row have one at -inf on both sides.
  enum { kOrdinary, kClose, kMasked, kNaN, kIgnored };

  const Kernels& kernels;
  const LossTraits traits;
  const std::string name;
  const Target target;
  const DType dtype;
  const int64_t rows, classes;
  const bool once;          // a class has one name, and values are in double
  const int64_t k, values;  // names and values of a row
  Setup setup;
  Report& report;
  const bool f64 = dtype == DType::kF64;
  const std::string plain_name = name.substr(0, name.find("_stats"));
  const std::string context = name + " target " + std::to_string(int(target)) + " dtype " +
                              std::to_string(int(dtype)) + " classes " + std::to_string(classes);

  RowBuffer x{dtype, rows, classes, setup.padding};
  RowBuffer t{dtype, rows, classes, setup.padding};
  RowBuffer dx = x, dt = t;      // sizes; the constructor copies the numbers
  std::vector<Doubles> teacher;  // what t has for all classes
  std::vector<int64_t> indices = std::vector<int64_t>(rows * k);
  std::vector<int64_t> labels = std::vector<int64_t>(rows), argmax = labels;
  Doubles class_weight = Doubles(classes, 1.0);
  Reals weight{f64, classes, 1}, row_weight{f64, rows, 1};
  Reals scales{f64, rows, 1};
  // Nothing is read beyond the last byte of a mask.
  const bool bits = setup.masks == Masks::kBits;
  const int64_t mask_bytes = bits ? (classes + 7) / 8 : classes;
  std::vector<uint8_t> mask = std::vector<uint8_t>(size_t(rows * mask_bytes));
  Reals value{f64 || once, rows * values, 777}, entropy{f64, rows, 777};
  Reals record{f64, rows * 8, 777};
  Reals stats{f64, 3 * rows, 777};
  Reals grad{f64 || once, rows * values, kGrad}, grad_entropy{f64, rows, kGradEntropy};
  std::vector<char> scratch = std::vector<char>(segment_count(classes) * kScratchPerSegment);
  RowArgs a;

  void expect(const char* what, double got, double expected, double tolerance) {
    report.expect(context, what, got, expected, tolerance);
  }

  void fill() {
    std::mt19937 random(1);
    std::normal_distribution<double> normal(0, 2);
    for (int64_t r = 0; r < rows; ++r) {
      Doubles logits(classes), target_row(classes);
      for (int64_t i = 0; i < classes; ++i)
        logits[i] = normal(random), target_row[i] = normal(random);
      if (r == kClose)
        for (int64_t i = 0; i < classes; ++i) target_row[i] = logits[i] + 0.01 * target_row[i];
      if (r == kMasked && classes > 2 && setup.softcap == 0)
        logits[classes - 1] = target_row[classes - 1] = -kInf;
      // Its exponential is 0, by bits that overflow on the way.
      if (r == kMasked && classes > 3 && setup.softcap == 0)
        logits[classes - 2] = target_row[classes - 2] = -200;
      if (r >= kNaN) logits[classes / 2] = target_row[0] = NAN;
      if (target != Target::kLogits) target_row = log_softmax(target_row, 1);
      if (target == Target::kProbs)
        // No smaller than what a half and the reciprocals in the gradients can hold.
        for (double& v : target_row)
          if (v == v) v = v == -kInf ? 0 : std::fmax(std::exp(v), 1e-3);
      labels[r] = r == kIgnored ? -100 : (r * 7) % (classes > 2 ? classes - 1 : 1);
      for (int64_t i = 0; i < classes; ++i) x.set(r, i, logits[i]);
      fill_target(r, target_row);
      fill_names(r);
      fill_mask(r);
      if (setup.own_scales) scales.set(r, setup.scale * (1 + 0.25 * double(r)));
      teacher.push_back(target_row);
    }
    if (setup.weights)
      for (int64_t i = 0; i < classes; ++i) weight.set(i, class_weight[i] = 0.5 + double(i % 4));
    if (rows > kIgnored) row_weight.set(kIgnored, 0);
  }
  // Store a target row, and set it to the rounded numbers that the kernels read.
  void fill_target(int64_t r, Doubles& target_row) {
    for (int64_t i = 0; i < classes; ++i) t.set(r, i, target_row[i]);
    target_row = t.row(r);
  }
  // Some names are padding; without `once`, two are of one class.
  void fill_names(int64_t r) {
    for (int64_t j = 0; j < k; ++j) {
      int64_t& y = indices[r * k + j] = (3 * j + r) % classes;
      if (j == 2) y = once ? -1 : indices[r * k];
      if (r == kIgnored) y = j % 2 ? -1 : INT64_MAX;
      if (traits.named) grad.set(r * values + j, kGrad * (0.5 + double(j % 4)));
    }
  }
  bool takes_part(int64_t r, int64_t i) const {
    const bool has_nan = r >= kNaN && (i == 0 || i == classes / 2);
    return setup.masks == Masks::kNone || has_nan || i == labels[r] || (i + r) % 3 != 1;
  }
  void fill_mask(int64_t r) {
    for (int64_t i = 0; i < classes; ++i) {
      if (!takes_part(r, i)) continue;
      if (bits)
        mask[size_t(r * mask_bytes + i / 8)] |= uint8_t(1 << (i % 8));
      else
        mask[size_t(r * mask_bytes + i)] = 1;
    }
  }

  void set_arguments(LossId loss, bool split) {
    a.rows = rows, a.classes = classes, a.dtype = dtype;
    a.x = x.matrix(), a.dx = dx.matrix();
    if (target != Target::kNone) a.t = t.matrix(), a.dt = dt.matrix();
    if (traits.named) a.k = k, a.indices = {indices.data(), k, IndexType::kI64};
    if (setup.masks != Masks::kNone) a.mask = {mask.data(), mask_bytes, bits};
    if (setup.own_scales) a.row_scale = scales.data();
    if (traits.reads_label) a.labels = labels.data(), a.ignore_index = -100;
    if (setup.weights) a.class_weight = weight.data();
    a.row_weight = row_weight.data();
    a.scale = setup.scale, a.softcap = setup.softcap;
    a.params = {loss, 0.3, 1, 0, 0, false, target};
    if (plain_name.find("cross_entropy") != std::string::npos) a.params.z_loss = 1e-2;
    a.params.by_probability = plain_name == "cross_entropy" && setup.own_scales;
    if (plain_name == "smoothed_cross_entropy" || plain_name == "soft_cross_entropy")
      a.params.confidence = 0.9, a.params.smoothing_per_class = 0.1 / double(classes);
    a.value = value.data(), a.record = record.data();
    a.grad = grad.data(), a.grad_stride = 1;
    if (traits.two_outputs) a.entropy = entropy.data(), a.grad_entropy = grad_entropy.data();
    if (traits.stats) a.stats = stats.data(), a.argmax = argmax.data();
    if (split) a.split_columns = three_threads, a.scratch = scratch.data();
  }

  Plain plain_of(int64_t r) {
    if (r == kIgnored) return {0, 0, Doubles(classes), Doubles(classes), Doubles(values)};
    PlainCall of_row{a, x.row(r), teacher[r], labels[r], class_weight};
    of_row.scale = setup.own_scales ? scales[r] : a.scale;
    for (int64_t i = 0; i < classes; ++i) of_row.part.push_back(takes_part(r, i));
    Plain plain;
    if (traits.named) {
      Doubles upstream(values);
      for (int64_t j = 0; j < values; ++j) upstream[j] = grad[r * values + j];
      plain = plain_named(of_row, rest_of(a.params.loss), &indices[r * k], k, upstream);
    } else {
      plain = plain_row(plain_name, target, of_row);
    }
    if (r == kNaN) plain.value = plain.entropy = NAN;
    if (r == kNaN && traits.named)
      for (int64_t j = 0; j < k; ++j)
        if (indices[r * k + j] >= 0) plain.values[j] = NAN;
    return plain;
  }

  void check_value(int64_t r, const Plain& plain) {
    const double digits = f64 ? 1e-11 : 2e-5;
    if (traits.named) {
      for (int64_t j = 0; j < values; ++j) {
        const double v = plain.values[j];
        if (r != kNaN || j < k)
          expect("value", value[r * values + j], v, digits * (10 + std::abs(v)));
      }
      return;
    }
    expect("value", value[r], plain.value, digits * (10 + std::abs(plain.value)));
    if (traits.two_outputs) expect("second output", entropy[r], plain.entropy, digits * 20);
    if (!traits.stats || r >= kNaN) return;
    expect("entropy", stats[rows + r], plain.entropy, digits * 20);
    for (int64_t i = 0; i < classes; ++i)
      if (takes_part(r, i)) expect("maximum", x.get(r, argmax[r]) >= x.get(r, i), 1, 0);
  }
  void check_gradients(int64_t r, const Plain& plain) {
    const double digits = f64 ? 1e-11 : 2e-5;
    const double stored = dtype == DType::kBF16 ? 8e-3 : (dtype == DType::kF16 ? 1e-3 : digits);
    for (int64_t i = 0; i < classes; ++i)
      expect("dx", dx.get(r, i), plain.dx[i], stored * (1e-2 + std::abs(plain.dx[i])) + digits);
    if (target == Target::kNone) return;
    for (int64_t i = 0; i < t.classes; ++i)
      expect("dt", dt.get(r, i), plain.dt[i], stored * (1e-2 + std::abs(plain.dt[i])) + 5 * digits);
  }
};

}  // namespace fastdiv
