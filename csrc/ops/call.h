// The private ops, for either device: each reads its arguments, runs a kernel and returns tensors.
//
// A Device is made for each call.  It finds kernels (find), runs them (run), sums rows (reduce),
// and says where memory is (type, index).
#pragma once

#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "losses/divergence.h"
#include "losses/named.h"
#include "ops/arguments.h"

namespace fastdiv {

template <class Device>
struct RowCall {
  const Tensor& x;
  const Options& options;
  Device device{x};
  const typename Device::Kernels& kernels;
  RowArgs args;
  const ScalarType real = compute_type(x);
  const int64_t outputs = kernels.traits.two_outputs ? 2 : 1;
  OptionalTensor overwritten;

  RowCall(const RowTensors& rows, const Options& options)
      : x(rows.x),
        options(options),
        kernels(find(options, dtype_of(x))),
        args(row_args(rows, options, kernels.traits)) {}

  static const typename Device::Kernels& find(const Options& o, DType dtype) {
    require(o.loss < LossId::kCount, "fastdiv: unknown loss");
    const typename Device::Kernels* kernels = Device::find(o.loss, o.target, dtype);
    require(kernels != nullptr, "fastdiv: this loss does not take this target type");
    return *kernels;
  }

  template <size_t dims>
  Tensor make(const int64_t (&size)[dims], ScalarType type) const {
    int64_t stride[dims];
    for (size_t d = dims; d-- > 0;) stride[d] = d + 1 == dims ? 1 : stride[d + 1] * size[d + 1];
    return make(int64_t(dims), size, stride, type);
  }
  Tensor make_number() const { return make(0, nullptr, nullptr, real); }
  // The values of named classes, which may be in double, and a number about the rest.
  const bool named = kernels.traits.named;
  const ScalarType value_type = named && names_once(options.loss) ? ScalarType::Double : real;
  const int64_t values = named ? args.k + (rest_of(options.loss) != Rest::kNone) : 1;

  Tensor make_rows() const {
    if (named) return make({args.rows, values}, value_type);
    return outputs == 2 ? make({2, args.rows}, real) : make({args.rows}, real);
  }
  Tensor make_record() const { return make({args.rows, kRecordSize}, real); }
  // Return the gradient of x or t, and set d to it; an empty tensor if it is not needed.
  Tensor make_gradient(const Tensor& of, Matrix& d, bool needed) const {
    if (!needed) return make({0}, of.scalar_type());
    const OptionalTensor warm = Device::warm_gradient(of);
    Tensor gradient = warm ? *warm : make({of.size(0), of.size(1)}, of.scalar_type());
    if (!warm)
      Device::before_first_write(gradient.data_ptr(), gradient.numel() * size_of(dtype_of(of)));
    d = matrix_of(gradient, of);
    return gradient;
  }

  void write_over_x() {
    args.dx = args.x;
    if (!Device::kKeepsOverwritten || args.k == 0) return;
    overwritten = make({args.rows, args.k}, real);
    args.overwritten = overwritten->data_ptr();
  }

  // Return where the second output begins, or null if there is only one.
  void* second(void* rows) const {
    const int64_t bytes = real == ScalarType::Double ? 8 : 4;
    return outputs == 2 ? static_cast<char*>(rows) + args.rows * bytes : nullptr;
  }
  void set_values(const Tensor& rows) {
    args.value = rows.data_ptr();
    args.entropy = second(args.value);
  }
  void set_record(const Tensor& record) {
    require_same_device(record, x);
    require(record.dim() == 2 && record.size(0) == args.rows && record.size(1) == kRecordSize &&
                record.is_contiguous() && record.scalar_type() == real,
            "fastdiv: the record is not one of this input's forward");
    args.record = record.data_ptr();
  }
  // The upstream gradient is one number, or one per row and output.
  void set_upstream(const Tensor& grad) {
    require_same_device(grad, x);
    require(grad.scalar_type() == value_type && grad.is_contiguous() &&
                (grad.dim() == 0 ? outputs == 1 && !named
                                 : grad.numel() == args.rows * outputs * values),
            "fastdiv: the upstream gradient has the wrong size, dtype or stride");
    args.grad = grad.data_ptr();
    args.grad_entropy = second(grad.data_ptr());
    args.grad_stride = grad.dim() == 0 ? 0 : 1;
  }

  // Return the reduced value, the record, and the divisor (0 without a reduction).
  std::tuple<Tensor, Tensor, Tensor> forward() {
    const bool none = options.reduction == Reduction::kNone;
    require(none || (outputs == 1 && !named), "fastdiv: several values of a row have no reduction");
    // An empty tensor has no address, so a call without rows is not checked.
    require(args.rows == 0 || kernels.traits.stats == (args.stats != nullptr),
            "fastdiv: statistics of a loss without");
    device.check_labels(args);
    const Tensor rows = make_rows(), record = make_record();
    set_values(rows);
    set_record(record);
    device.run(kernels.forward, args);
    const Tensor value = none ? rows : make_number(), divisor = make_number();
    if (none)
      Device::clear(divisor);
    else
      device.reduce(args, options.reduction == Reduction::kMean,
                    options.reduction == Reduction::kBatchMean ? double(options.batch) : 1.0,
                    value.data_ptr(), divisor.data_ptr());
    return {value, record, divisor};
  }

  void backward(const Tensor& grad, const Tensor& record, const Tensor& divisor) {
    set_upstream(grad);
    set_record(record);
    if (options.reduction == Reduction::kMean || options.reduction == Reduction::kBatchMean) {
      require(divisor.numel() == 1 && divisor.scalar_type() == real,
              "fastdiv: the divisor is one number");
      require_same_device(divisor, x);
      args.divisor = divisor.data_ptr();
    }
    device.run(kernels.backward, args);
  }

  // Write the gradient of x over x; return the value of each row.
  Tensor forward_grad(const Tensor& grad) {
    require(kernels.forward_grad != nullptr && options.reduction == Reduction::kNone,
            "fastdiv: forward_grad takes an upstream gradient for each row, no statistics, and no "
            "named classes");
    device.check_labels(args);
    const Tensor rows = make_rows(), record = make_record();
    set_values(rows);
    set_record(record);
    set_upstream(grad);
    write_over_x();
    device.run(kernels.forward_grad, args);
    return rows;
  }

  // Return the TermSums of each row: f, u, v, q and p.
  Tensor terms(const Tensor& record) {
    require(kernels.terms != nullptr, "fastdiv: this loss has no terms");
    constexpr int64_t kSums = sizeof(TermSums<float>) / sizeof(float);
    const Tensor sums = make({args.rows, kSums}, real);
    set_record(record);
    args.terms = sums.data_ptr();
    device.run(kernels.terms, args);
    return sums;
  }

  // Make a tensor through the C interface.  torch::stable::new_empty goes through the dispatcher
  // and takes three times as long, which matters for tiny inputs.
  Tensor make(int64_t dims, const int64_t* size, const int64_t* stride, ScalarType type) const {
    const int32_t dtype = type == ScalarType::Float      ? aoti_torch_dtype_float32()
                          : type == ScalarType::Double   ? aoti_torch_dtype_float64()
                          : type == ScalarType::Half     ? aoti_torch_dtype_float16()
                          : type == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                                                         : aoti_torch_dtype_int64();
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(dims, size, stride, dtype, Device::type(), device.index, &handle));
    return Tensor(handle);
  }
};

// --- the kernels of the ops, for torch's dispatcher ---------------------------------------------

template <class Device>
void row_forward(StableIValue* stack, uint64_t n_arguments, uint64_t n_results) {
  Stack s(stack, n_arguments, n_results);
  const RowTensors rows(s);
  const Options options(s);
  RowCall<Device> call(rows, options);
  const auto [value, record, divisor] = call.forward();
  s.give(value, record, divisor);
}

template <class Device>
void row_forward_stats(StableIValue* stack, uint64_t n_arguments, uint64_t n_results) {
  Stack s(stack, n_arguments, n_results);
  const RowTensors rows(s);
  const Options options(s);
  RowCall<Device> call(rows, options);
  const Tensor stats = call.make({3, call.args.rows}, call.real);
  const Tensor argmax = call.make({call.args.rows}, ScalarType::Long);
  call.args.stats = stats.data_ptr();
  call.args.argmax = static_cast<int64_t*>(argmax.data_ptr());
  const auto [value, record, divisor] = call.forward();
  s.give(value, record, divisor, stats, argmax);
}

template <class Device>
void row_backward(StableIValue* stack, uint64_t n_arguments, uint64_t n_results) {
  Stack s(stack, n_arguments, n_results);
  const Tensor grad = s.take<Tensor>();
  const RowTensors rows(s);
  const Tensor record = s.take<Tensor>(), divisor = s.take<Tensor>();
  const Options options(s);
  const bool need_x = s.take<bool>(), need_t = s.take<bool>();
  RowCall<Device> call(rows, options);
  const Tensor dx = call.make_gradient(rows.x, call.args.dx, need_x);
  const Tensor dt = call.make_gradient(rows.target_or_x(), call.args.dt, need_t);
  if (need_x || need_t) call.backward(grad, record, divisor);
  s.give(dx, dt);
}

template <class Device>
void row_backward_in_place(StableIValue* stack, uint64_t n_arguments, uint64_t n_results) {
  Stack s(stack, n_arguments, n_results);
  const Tensor grad = s.take<Tensor>();
  const RowTensors rows(s);
  const Tensor record = s.take<Tensor>(), divisor = s.take<Tensor>();
  const Options options(s);
  const bool need_t = s.take<bool>();
  RowCall<Device> call(rows, options);
  const Tensor dt = call.make_gradient(rows.target_or_x(), call.args.dt, need_t);
  call.write_over_x();
  call.backward(grad, record, divisor);
  s.give(dt);
}

template <class Device>
void row_forward_grad(StableIValue* stack, uint64_t n_arguments, uint64_t n_results) {
  Stack s(stack, n_arguments, n_results);
  const Tensor grad = s.take<Tensor>();
  const RowTensors rows(s);
  const Options options(s);
  const bool need_t = s.take<bool>();
  RowCall<Device> call(rows, options);
  const Tensor dt = call.make_gradient(rows.target_or_x(), call.args.dt, need_t);
  s.give(call.forward_grad(grad), dt);
}

template <class Device>
void row_terms(StableIValue* stack, uint64_t n_arguments, uint64_t n_results) {
  Stack s(stack, n_arguments, n_results);
  const RowTensors rows(s);
  const Tensor record = s.take<Tensor>();
  const Options options(s);
  RowCall<Device> call(rows, options);
  s.give(call.terms(record));
}

// Register the kernels of a device, in its STABLE_TORCH_LIBRARY_IMPL.
template <class Device, class Library>
void register_ops(Library& m) {
  m.impl("_row_forward", row_forward<Device>);
  m.impl("_row_forward_stats", row_forward_stats<Device>);
  m.impl("_row_backward", row_backward<Device>);
  m.impl("_row_backward_", row_backward_in_place<Device>);
  m.impl("_row_forward_grad", row_forward_grad<Device>);
  m.impl("_row_terms", row_terms<Device>);
}

}  // namespace fastdiv
