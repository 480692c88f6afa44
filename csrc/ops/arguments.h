// The tensors of a private op, checked and turned into RowArgs.
#pragma once

#include "losses/row_args.h"
#include "ops/options.h"

namespace fastdiv {

inline DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::kF32;
    case ScalarType::Double:
      return DType::kF64;
    case ScalarType::Half:
      return DType::kF16;
    case ScalarType::BFloat16:
      return DType::kBF16;
    default:
      throw std::invalid_argument("fastdiv: the logits must be of a floating dtype");
  }
}
inline ScalarType compute_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void require_same_device(const Tensor& v, const Tensor& x) {
  require(v.is_cpu() == x.is_cpu() && v.get_device_index() == x.get_device_index(),
          "fastdiv: all tensors must be on one device");
}
inline Matrix matrix_of(const Tensor& m, int64_t columns, ScalarType type, const Tensor& x) {
  require_same_device(m, x);
  require(m.dim() == 2 && m.size(0) == x.size(0) && m.size(1) == columns &&
              (m.stride(1) == 1 || m.size(1) == 1) && m.scalar_type() == type,
          "fastdiv: input and target must be matrices of one shape and dtype, rows contiguous");
  return {m.data_ptr(), m.stride(0)};
}
inline Matrix matrix_of(const Tensor& m, const Tensor& like) {
  return matrix_of(m, like.size(1), like.scalar_type(), like);
}
inline Indices indices_of(const Tensor& m, const Tensor& x) {
  const ScalarType type = m.scalar_type();
  require(m.dim() == 2, "fastdiv: named classes are a matrix of indices");
  const Matrix matrix = matrix_of(m, m.size(1), type, x);
  switch (type) {
    case ScalarType::Long:
      return {matrix.data, matrix.stride, IndexType::kI64};
    case ScalarType::Int:
      return {matrix.data, matrix.stride, IndexType::kI32};
    case ScalarType::Short:
      return {matrix.data, matrix.stride, IndexType::kI16};
    case ScalarType::Byte:
      return {matrix.data, matrix.stride, IndexType::kU8};
    default:
      throw std::invalid_argument("fastdiv: indices are int64, int32, int16 or uint8");
  }
}
// One byte or one bit for each class.
inline ClassMask mask_of(const OptionalTensor& m, const Tensor& x) {
  if (!m) return {};
  const bool bits = m->scalar_type() == ScalarType::Byte;
  const int64_t columns = bits ? (x.size(1) + 7) / 8 : x.size(1);
  const Matrix matrix = matrix_of(*m, columns, bits ? ScalarType::Byte : ScalarType::Bool, x);
  return {static_cast<const uint8_t*>(matrix.data), matrix.stride, bits};
}
inline const void* vector_of(const OptionalTensor& v, int64_t size, ScalarType type,
                             const Tensor& x) {
  if (!v) return nullptr;
  require_same_device(*v, x);
  require(v->dim() == 1 && v->size(0) == size && v->is_contiguous() && v->scalar_type() == type,
          "fastdiv: a weight or label vector has the wrong size, dtype or stride");
  return v->data_ptr();
}

// What every op takes of a row.
struct RowTensors {
  Tensor x;
  OptionalTensor t, scale, labels, class_weight, row_weight, mask;

  // The schema without the type of x, which some ops overwrite.
  static constexpr const char* kSchema =
      "x, Tensor? t, Tensor? row_scale, Tensor? labels, Tensor? class_weight, Tensor? row_weight, "
      "Tensor? mask, ";

  explicit RowTensors(Stack& s)
      : x(s.take<Tensor>()),
        t(s.take<OptionalTensor>()),
        scale(s.take<OptionalTensor>()),
        labels(s.take<OptionalTensor>()),
        class_weight(s.take<OptionalTensor>()),
        row_weight(s.take<OptionalTensor>()),
        mask(s.take<OptionalTensor>()) {}

  const Tensor& target_or_x() const { return t ? *t : x; }
};

inline RowArgs row_args(const RowTensors& rows, const Options& o, const LossTraits& traits) {
  const Tensor& x = rows.x;
  const OptionalTensor &t = rows.t, &labels = rows.labels;
  RowArgs a;
  a.dtype = dtype_of(x);
  a.x = matrix_of(x, x);
  a.rows = x.size(0), a.classes = x.size(1);
  require(a.classes > 0, "fastdiv: there must be at least one class");
  require((o.target != Target::kNone) == t.has_value(), "fastdiv: target type without target");
  require((traits.reads_label || traits.named) == labels.has_value(),
          "fastdiv: a label where none belongs, or none");
  require(traits.softcap || o.softcap == 0, "fastdiv: this loss does not take softcapped logits");
  if (t) a.t = matrix_of(*t, x);
  if (traits.named) {
    a.indices = indices_of(*labels, x);
    a.k = labels->size(1);
  } else {
    a.labels = static_cast<const int64_t*>(vector_of(labels, a.rows, ScalarType::Long, x));
  }
  a.mask = mask_of(rows.mask, x);
  a.class_weight = vector_of(rows.class_weight, a.classes, compute_type(x), x);
  a.row_weight = vector_of(rows.row_weight, a.rows, compute_type(x), x);
  a.ignore_index = o.ignore_index;
  a.first_class = o.first_class;
  a.row_scale = vector_of(rows.scale, a.rows, compute_type(x), x);
  a.scale = o.scale;
  a.softcap = o.softcap;
  a.params = o.params;
  return a;
}

}  // namespace fastdiv
