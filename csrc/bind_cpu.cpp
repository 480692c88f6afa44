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

void check_labels(const RowArgs& a) {
  if (!a.label) return;
  for (int64_t r = 0; r < a.rows; ++r) {
    const int64_t y = a.label[r];
    const bool none = a.ignore_index == INT64_MIN;  // is ignored: log_prob, whose label is an index
    if ((y >= 0 && y < a.classes) || (y == a.ignore_index && !none)) continue;
    throw std::out_of_range(
        (none ? "index[" : "target[") + std::to_string(r) + "] is " + std::to_string(y) +
        ", out of range for " + std::to_string(a.classes) + " classes" +
        (none ? "" : " (ignore_index is " + std::to_string(a.ignore_index) + ")"));
  }
}

// Sum over rows in double, in order: the same bits for any number of threads.
template <class real>
double sum_rows(const void* value, int64_t rows) {
  double sum = 0;
  for (int64_t r = 0; r < rows; ++r) sum += double(static_cast<const real*>(value)[r]);
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

// One call of an op: what its arguments come to, and the tensors it makes.
struct Call {
  const Tensor& x;
  const Options& options;
  RowArgs args;
  const RowKernels& kernels;
  const ScalarType real = compute_type(x);
  const int64_t outputs = kernels.two_outputs ? 2 : 1;

  Call(const Tensor& x, const OptionalTensor& t, const OptionalTensor& label,
       const OptionalTensor& class_weight, const OptionalTensor& row_weight, const Options& options)
      : x(x),
        options(options),
        args(row_args(x, t, label, class_weight, row_weight, options)),
        kernels(find(options, args)) {
    require(kernels.label == label.has_value(), "fastdiv: a label where none belongs, or none");
  }

  static const RowKernels& find(const Options& o, const RowArgs& a) {
    require(o.loss < LossId::kCount, "fastdiv: unknown loss");
    const RowKernels* kernels = instruction_set().find(o.loss, o.target, a.dtype == DType::kF64);
    require(kernels != nullptr, "fastdiv: this loss does not take this target type");
    return *kernels;
  }

  // Straight through the C interface: torch::stable::new_empty goes through the dispatcher, which
  // takes three times as long, and on tiny inputs that is what there is to save.
  template <size_t dims>
  Tensor make(const int64_t (&size)[dims], ScalarType type) const {
    int64_t stride[dims];
    for (size_t d = dims; d-- > 0;) stride[d] = d + 1 == dims ? 1 : stride[d + 1] * size[d + 1];
    return make(int64_t(dims), size, stride, type);
  }
  Tensor make_number(double v) const {
    const Tensor number = make(0, nullptr, nullptr, real);
    if (real == ScalarType::Double)
      *static_cast<double*>(number.data_ptr()) = v;
    else
      *static_cast<float*>(number.data_ptr()) = float(v);
    return number;
  }
  Tensor make_rows() const {
    return outputs == 2 ? make({2, args.rows}, real) : make({args.rows}, real);
  }
  // Of rows [outputs, rows], where the second output begins.
  void* second(void* rows) const {
    const int64_t bytes = real == ScalarType::Double ? 8 : 4;
    return outputs == 2 ? static_cast<char*>(rows) + args.rows * bytes : nullptr;
  }

  Tensor make_gradient(Matrix& d, bool needed) const {
    if (!needed) return make({0}, x.scalar_type());
    Tensor gradient = make({args.rows, args.classes}, x.scalar_type());
    advise_huge_pages(gradient.data_ptr(), gradient.numel() * size_of(args.dtype));
    d = matrix_of(gradient, x);
    return gradient;
  }

  void set_values(const Tensor& rows) {
    args.value = rows.data_ptr();
    args.entropy = second(args.value);
  }

  void set_record(const Tensor& record) {
    require(record.dim() == 2 && record.size(0) == args.rows && record.size(1) == kRecordSize &&
                record.is_contiguous() && record.scalar_type() == real,
            "fastdiv: the record is not one of this input's forward");
    args.record = record.data_ptr();
  }

  // One number, or one for each row and output.
  void set_upstream(const Tensor& grad) {
    require(grad.scalar_type() == real && grad.is_contiguous() &&
                (grad.dim() == 0 ? outputs == 1 : grad.numel() == args.rows * outputs),
            "fastdiv: the upstream gradient has the wrong size, dtype or stride");
    args.grad = grad.data_ptr();
    args.grad_entropy = second(grad.data_ptr());
    args.grad_stride = grad.dim() == 0 ? 0 : 1;
  }

  // Value, reduced; record; what a mean was divided by.
  std::tuple<Tensor, Tensor, Tensor> forward() {
    const bool none = options.reduction == Reduction::kNone;
    require(none || outputs == 1, "fastdiv: a loss of two outputs has no reduction");
    require(kernels.stats == (args.stats != nullptr), "fastdiv: statistics of a loss without");
    check_labels(args);
    const bool f64 = real == ScalarType::Double;
    const double divisor =
        options.reduction == Reduction::kMean
            ? (f64 ? total_weight<double> : total_weight<float>)(args)
            : (options.reduction == Reduction::kBatchMean ? double(options.batch) : 1.0);
    const Tensor record = make({args.rows, kRecordSize}, real), total = make_number(divisor);
    set_record(record);
    if (none) {
      const Tensor rows = make_rows();
      set_values(rows);
      run(kernels.forward, args);
      return {rows, record, total};
    }
    const std::unique_ptr<char[]> rows(new char[args.rows * sizeof(double)]);
    args.value = rows.get();
    run(kernels.forward, args);
    const double sum = (f64 ? sum_rows<double> : sum_rows<float>)(args.value, args.rows);
    const Tensor value = make_number(sum / divisor);
    return {value, record, total};
  }

  Tensor make(int64_t dims, const int64_t* size, const int64_t* stride, ScalarType type) const {
    const int32_t dtype = type == ScalarType::Float      ? aoti_torch_dtype_float32()
                          : type == ScalarType::Double   ? aoti_torch_dtype_float64()
                          : type == ScalarType::Half     ? aoti_torch_dtype_float16()
                          : type == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                                                         : aoti_torch_dtype_int64();
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, size, stride, dtype,
                                                    aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
  }

  void backward(const Tensor& grad, const Tensor& record, const Tensor& total) {
    set_upstream(grad);
    set_record(record);
    require(total.numel() == 1 && total.scalar_type() == real, "fastdiv: total is one number");
    if (options.reduction == Reduction::kMean || options.reduction == Reduction::kBatchMean)
      args.total = total.data_ptr();
    run(kernels.backward, args);
  }
};

#define FD_ROWS                                                                             \
  const OptionalTensor &t, const OptionalTensor &label, const OptionalTensor &class_weight, \
      const OptionalTensor &row_weight
#define FD_OPTIONS                                                                           \
  int64_t loss, int64_t target_type, int64_t reduction, int64_t batch, int64_t ignore_index, \
      double scale, double softcap, double shape, double label_rate, double spread, double z_loss
#define FD_CALL                                                                                   \
  const Options options(loss, target_type, reduction, batch, ignore_index, scale, softcap, shape, \
                        label_rate, spread, z_loss);                                              \
  Call call(x, t, label, class_weight, row_weight, options)

std::tuple<Tensor, Tensor, Tensor> row_forward(const Tensor& x, FD_ROWS, FD_OPTIONS) {
  FD_CALL;
  return call.forward();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> row_forward_stats(const Tensor& x, FD_ROWS,
                                                                     FD_OPTIONS) {
  FD_CALL;
  const Tensor stats = call.make({3, call.args.rows}, call.real);
  const Tensor argmax = call.make({call.args.rows}, ScalarType::Long);
  call.args.stats = stats.data_ptr();
  call.args.argmax = static_cast<int64_t*>(argmax.data_ptr());
  const auto [value, record, total] = call.forward();
  return {value, record, total, stats, argmax};
}

std::tuple<Tensor, Tensor> row_backward(const Tensor& grad, const Tensor& x, FD_ROWS,
                                        const Tensor& record, const Tensor& total, FD_OPTIONS,
                                        bool need_x, bool need_t) {
  FD_CALL;
  const Tensor dx = call.make_gradient(call.args.dx, need_x);
  const Tensor dt = call.make_gradient(call.args.dt, need_t);
  call.backward(grad, record, total);
  return {dx, dt};
}

Tensor row_backward_(const Tensor& grad, const Tensor& x, FD_ROWS, const Tensor& record,
                     const Tensor& total, FD_OPTIONS, bool need_t) {
  FD_CALL;
  const Tensor dt = call.make_gradient(call.args.dt, need_t);
  call.args.dx = call.args.x;
  call.backward(grad, record, total);
  return dt;
}

std::tuple<Tensor, Tensor> row_forward_grad(const Tensor& grad, const Tensor& x, FD_ROWS,
                                            FD_OPTIONS, bool need_t) {
  FD_CALL;
  require(!call.kernels.stats && call.options.reduction == Reduction::kNone,
          "fastdiv: forward_grad takes an upstream gradient for each row, and no statistics");
  check_labels(call.args);
  const Tensor rows = call.make_rows(),
               record = call.make({call.args.rows, kRecordSize}, call.real);
  const Tensor dt = call.make_gradient(call.args.dt, need_t);
  call.set_values(rows);
  call.set_record(record);
  call.set_upstream(grad);
  call.args.dx = call.args.x;
  run(call.kernels.forward_grad, call.args);
  return {rows, dt};
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
