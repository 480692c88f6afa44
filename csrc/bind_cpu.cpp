// The private ops on CPU: checks, memory, the split of the work, the reduction over rows.
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"
#include "row_ops.h"

namespace fastdiv {
namespace {

void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                  void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
}

// Rows go to threads; where they are too few for that, the column segments of each row do.
void run(RowKernel kernel, RowArgs& args) {
  constexpr int64_t kElementsPerTask = 1 << 15;
  const int64_t threads = torch::stable::get_num_threads();
  std::unique_ptr<char[]> scratch;
  if (threads > 1 && args.rows < 2 * threads && args.classes > kSegment) {
    scratch.reset(new char[segment_count(args.classes) * kScratchPerSegment]);
    args.scratch = scratch.get();
    args.split_columns = parallel_for;
    return kernel(args, 0, args.rows);
  }
  struct Task {
    RowKernel kernel;
    const RowArgs* args;
  } task{kernel, &args};
  const int64_t grain = args.classes < kElementsPerTask ? kElementsPerTask / args.classes : 1;
  parallel_for(
      0, args.rows, grain,
      [](int64_t begin, int64_t end, void* context) {
        const Task& t = *static_cast<const Task*>(context);
        t.kernel(*t.args, begin, end);
      },
      &task);
}

const RowKernels& kernels_of(const Options& o, const RowArgs& a) {
  require(o.loss < LossId::kCount, "fastdiv: unknown loss");
  const RowKernels* kernels = instruction_set().find(o.loss, o.target, a.dtype == DType::kF64);
  require(kernels != nullptr, "fastdiv: this loss does not take this target type");
  return *kernels;
}

void check_labels(const RowArgs& a) {
  if (!a.label) return;
  const std::string ignored = a.ignore_index == INT64_MIN  // none is
                                  ? ""
                                  : " (ignore_index is " + std::to_string(a.ignore_index) + ")";
  for (int64_t r = 0; r < a.rows; ++r) {
    const int64_t y = a.label[r];
    if ((y < 0 || y >= a.classes) && y != a.ignore_index)
      throw std::out_of_range("target[" + std::to_string(r) + "] is " + std::to_string(y) +
                              ", out of range for " + std::to_string(a.classes) + " classes" +
                              ignored);
  }
}

// Sum over rows in double, in order: the same bits for any number of threads.
template <class real>
double sum_rows(const real* value, int64_t rows) {
  double sum = 0;
  for (int64_t r = 0; r < rows; ++r) sum += double(value[r]);
  return sum;
}

// What a mean is divided by: the weights of the rows that count.
template <class real>
double total_weight(const RowArgs& a) {
  const real* row_weight = static_cast<const real*>(a.row_weight);
  const real* class_weight = a.label ? static_cast<const real*>(a.class_weight) : nullptr;
  double sum = 0;
  for (int64_t r = 0; r < a.rows; ++r) {
    if (a.label && a.label[r] == a.ignore_index) continue;
    sum += double(row_weight ? row_weight[r] : real(1)) *
           double(class_weight ? class_weight[a.label[r]] : real(1));
  }
  return sum;
}

template <class real>
void reduce(const RowArgs& a, const Options& o, real* value, real* total) {
  const double sum = sum_rows(static_cast<const real*>(a.value), a.rows);
  *total = real(o.reduction == Reduction::kMean        ? total_weight<real>(a)
                : o.reduction == Reduction::kBatchMean ? double(o.batch)
                                                       : 1.0);
  *value = real(sum / double(*total));
}

Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> size, ScalarType type) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(size), type);
}

Tensor new_gradient(const Tensor& x, bool needed) {
  if (!needed) return new_tensor(x, {0}, x.scalar_type());
  Tensor d = new_tensor(x, {x.size(0), x.size(1)}, x.scalar_type());
  advise_huge_pages(d.data_ptr(), d.numel() * size_of(dtype_of(x)));
  return d;
}

#define FD_ROWS                                                                             \
  const OptionalTensor &t, const OptionalTensor &label, const OptionalTensor &class_weight, \
      const OptionalTensor &row_weight
#define FD_OPTIONS                                                                           \
  int64_t loss, int64_t target_type, int64_t reduction, int64_t batch, int64_t ignore_index, \
      double scale, double softcap, double shape, double label_rate, double spread, double z_loss
#define FD_OPTION_NAMES                                                                         \
  loss, target_type, reduction, batch, ignore_index, scale, softcap, shape, label_rate, spread, \
      z_loss

struct Forward {
  Tensor value, record, total;
};

Forward forward(const Tensor& x, RowArgs& a, const Options& o) {
  const RowKernels& kernels = kernels_of(o, a);
  check_labels(a);
  const ScalarType real = compute_type(x);
  const bool two = o.loss == LossId::k_log_prob_and_entropy, none = o.reduction == Reduction::kNone;
  require(none || !two, "fastdiv: log_prob_and_entropy has no reduction");
  Tensor rows = two ? new_tensor(x, {2, a.rows}, real) : new_tensor(x, {a.rows}, real);
  Tensor record = new_tensor(x, {a.rows, kRecordSize}, real);
  Tensor total = new_tensor(x, {}, real);
  a.value = rows.data_ptr();
  a.entropy = static_cast<char*>(a.value) +
              (two ? a.rows * size_of(real == ScalarType::Double ? DType::kF64 : DType::kF32) : 0);
  set_record(a, record, x);
  run(kernels.forward, a);
  if (none) return {rows, record, total};
  Tensor value = new_tensor(x, {}, real);
  if (real == ScalarType::Double)
    reduce(a, o, static_cast<double*>(value.data_ptr()), static_cast<double*>(total.data_ptr()));
  else
    reduce(a, o, static_cast<float*>(value.data_ptr()), static_cast<float*>(total.data_ptr()));
  return {value, record, total};
}

std::tuple<Tensor, Tensor, Tensor> row_forward(const Tensor& x, FD_ROWS, FD_OPTIONS) {
  const Options o(FD_OPTION_NAMES);
  RowArgs a = row_args(x, t, label, class_weight, row_weight, o);
  const Forward f = forward(x, a, o);
  return {f.value, f.record, f.total};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> row_forward_stats(const Tensor& x, FD_ROWS,
                                                                     FD_OPTIONS) {
  const Options o(FD_OPTION_NAMES);
  RowArgs a = row_args(x, t, label, class_weight, row_weight, o);
  Tensor stats = new_tensor(x, {3, a.rows}, compute_type(x));
  Tensor argmax = new_tensor(x, {a.rows}, ScalarType::Long);
  a.stats = stats.data_ptr();
  a.argmax = static_cast<int64_t*>(argmax.data_ptr());
  const Forward f = forward(x, a, o);
  return {f.value, f.record, f.total, stats, argmax};
}

// grad: one number, or one for each row (two rows of them for log_prob_and_entropy).
void set_upstream(RowArgs& a, const Options& o, const Tensor& grad, ScalarType real) {
  const bool two = o.loss == LossId::k_log_prob_and_entropy;
  require(grad.scalar_type() == real && grad.is_contiguous() &&
              (grad.dim() == 0 ? !two : grad.numel() == a.rows * (two ? 2 : 1)),
          "fastdiv: the upstream gradient has the wrong size, dtype or stride");
  a.grad = grad.data_ptr();
  a.grad_stride = grad.dim() == 0 ? 0 : 1;
  const int64_t bytes = real == ScalarType::Double ? 8 : 4;
  if (two) a.grad_entropy = static_cast<const char*>(a.grad) + a.rows * bytes;
}

void backward(const Tensor& grad, const Tensor& x, RowArgs& a, const Options& o,
              const Tensor& record, const Tensor& total) {
  set_upstream(a, o, grad, compute_type(x));
  set_record(a, record, x);
  require(total.numel() == 1 && total.scalar_type() == compute_type(x), "fastdiv: bad total");
  if (o.reduction == Reduction::kMean || o.reduction == Reduction::kBatchMean)
    a.total = total.data_ptr();
  run(kernels_of(o, a).backward, a);
}

std::tuple<Tensor, Tensor> row_backward(const Tensor& grad, const Tensor& x, FD_ROWS,
                                        const Tensor& record, const Tensor& total, FD_OPTIONS,
                                        bool need_x, bool need_t) {
  const Options o(FD_OPTION_NAMES);
  RowArgs a = row_args(x, t, label, class_weight, row_weight, o);
  Tensor dx = new_gradient(x, need_x), dt = new_gradient(x, need_t);
  if (need_x) a.dx = matrix_of(dx, x);
  if (need_t) a.dt = matrix_of(dt, x);
  backward(grad, x, a, o, record, total);
  return {dx, dt};
}

Tensor row_backward_(const Tensor& grad, const Tensor& x, FD_ROWS, const Tensor& record,
                     const Tensor& total, FD_OPTIONS, bool need_t) {
  const Options o(FD_OPTION_NAMES);
  RowArgs a = row_args(x, t, label, class_weight, row_weight, o);
  Tensor dt = new_gradient(x, need_t);
  a.dx = a.x;
  if (need_t) a.dt = matrix_of(dt, x);
  backward(grad, x, a, o, record, total);
  return dt;
}

std::tuple<Tensor, Tensor> row_forward_grad(const Tensor& grad, const Tensor& x, FD_ROWS,
                                            FD_OPTIONS, bool need_t) {
  const Options o(FD_OPTION_NAMES);
  RowArgs a = row_args(x, t, label, class_weight, row_weight, o);
  require(o.reduction == Reduction::kNone, "fastdiv: forward_grad takes a gradient for each row");
  const RowKernels& kernels = kernels_of(o, a);
  check_labels(a);
  const ScalarType real = compute_type(x);
  set_upstream(a, o, grad, real);
  const bool two = o.loss == LossId::k_log_prob_and_entropy;
  Tensor value = two ? new_tensor(x, {2, a.rows}, real) : new_tensor(x, {a.rows}, real);
  Tensor record = new_tensor(x, {a.rows, kRecordSize}, real), dt = new_gradient(x, need_t);
  a.value = value.data_ptr();
  a.entropy =
      static_cast<char*>(a.value) + (two ? a.rows * (real == ScalarType::Double ? 8 : 4) : 0);
  set_record(a, record, x);
  a.dx = a.x;
  if (need_t) a.dt = matrix_of(dt, x);
  run(kernels.forward_grad, a);
  return {value, dt};
}

}  // namespace
}  // namespace fastdiv

STABLE_TORCH_LIBRARY(fastdiv, m) {
  m.def("_row_forward(Tensor x, " FD_ROWS_SCHEMA FD_OPTIONS_SCHEMA
        ") -> (Tensor value, Tensor record, Tensor total)");
  m.def("_row_forward_stats(Tensor x, " FD_ROWS_SCHEMA FD_OPTIONS_SCHEMA
        ") -> (Tensor value, Tensor record, Tensor total, Tensor stats, Tensor argmax)");
  m.def("_row_backward(Tensor grad, Tensor x, " FD_ROWS_SCHEMA
        "Tensor record, Tensor total, " FD_OPTIONS_SCHEMA
        ", bool need_x, bool need_t) -> (Tensor dx, Tensor dt)");
  m.def("_row_backward_(Tensor grad, Tensor(a!) x, " FD_ROWS_SCHEMA
        "Tensor record, Tensor total, " FD_OPTIONS_SCHEMA ", bool need_t) -> Tensor dt");
  m.def("_row_forward_grad(Tensor grad, Tensor(a!) x, " FD_ROWS_SCHEMA FD_OPTIONS_SCHEMA
        ", bool need_t) -> (Tensor value, Tensor dt)");
}

STABLE_TORCH_LIBRARY_IMPL(fastdiv, CPU, m) {
  m.impl("_row_forward", TORCH_BOX(&fastdiv::row_forward));
  m.impl("_row_forward_stats", TORCH_BOX(&fastdiv::row_forward_stats));
  m.impl("_row_backward", TORCH_BOX(&fastdiv::row_backward));
  m.impl("_row_backward_", TORCH_BOX(&fastdiv::row_backward_));
  m.impl("_row_forward_grad", TORCH_BOX(&fastdiv::row_forward_grad));
}
