// RowArgs: the arguments of a kernel, the same for both devices.
#pragma once

#include "losses/loss.h"

namespace fastdiv {

enum class DType : int { kF32 = 0, kF64 = 1, kF16 = 2, kBF16 = 3 };

FD_FN int64_t size_of(DType d) { return d == DType::kF64 ? 8 : (d == DType::kF32 ? 4 : 2); }

// A matrix of logits or of a target.  Rows may have any stride; classes are contiguous.
struct Matrix {
  void* data = nullptr;
  int64_t stride = 0;  // in elements
};

// Which classes of a row take part: a byte or a bit for each.  Class c is bit c % 8 of byte c / 8.
struct ClassMask {
  const uint8_t* data = nullptr;  // null: all do
  int64_t stride = 0;             // bytes between rows; 0: one mask for all rows
  bool bits = false;

  FD_FN const uint8_t* row(int64_t r) const { return data ? data + r * stride : nullptr; }
  // Return whether a class takes part, from the mask of its row.
  FD_FN bool has(const uint8_t* row, int64_t c) const {
    return bits ? row[c / 8] >> (c % 8) & 1 : row[c] != 0;
  }
};

enum class IndexType : int { kI64 = 0, kI32 = 1, kI16 = 2, kU8 = 3 };
constexpr int64_t kNoClass = -1;  // an index that is padding

// Names of classes: k indices in each row.
struct Indices {
  const void* data = nullptr;
  int64_t stride = 0;  // in elements
  IndexType type = IndexType::kI64;

  FD_FN int64_t at(int64_t r, int64_t j) const {
    const int64_t i = r * stride + j;
    switch (type) {
      case IndexType::kI32:
        return static_cast<const int32_t*>(data)[i];
      case IndexType::kI16:
        return static_cast<const int16_t*>(data)[i];
      case IndexType::kU8:
        return static_cast<const uint8_t*>(data)[i];
      default:
        return static_cast<const int64_t*>(data)[i];
    }
  }
};

// torch's thread pool: it calls body(begin, end, context) for pieces of [begin, end).
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain,
                             void (*body)(int64_t, int64_t, void*), void* context);

// `real` is double if the logits are double, else float.  Pointers that do not apply are null.
struct RowArgs {
  int64_t rows = 0, classes = 0;
  DType dtype = DType::kF32;  // of x, t, dx and dt
  Matrix x, t;
  ClassMask mask;                      // of x, and of t
  int64_t k = 0;                       // how many classes have a name
  Indices indices;                     // [rows, k]
  int64_t first_class = 0;             // that of column 0, which indices count from
  const int64_t* labels = nullptr;     // [rows]
  int64_t ignore_index = 0;            // rows with this label are ignored
  const void* class_weight = nullptr;  // real [classes]
  const void* row_weight = nullptr;    // real [rows]; 0: the row is ignored
  const void* row_scale = nullptr;     // real [rows], instead of scale
  double scale = 1;                    // 1 / temperature, for x and for a t of logits
  double softcap = 0;                  // 0: none
  LossParams params{};

  // forward
  void* value = nullptr;      // real [rows], multiplied by the row weight.  Of named classes: real
                              // [rows, k], or double [rows, k or k + 1], without the weight
  void* entropy = nullptr;    // real [rows], the second output if there are two
  void* record = nullptr;     // P::Record [rows]: written by the forward, read by the backward
  void* stats = nullptr;      // real [3, rows]: lse, entropy, log_prob
  int64_t* argmax = nullptr;  // [rows]

  void* terms = nullptr;  // TermSums<real> [rows]

  // backward
  const void* grad = nullptr;          // real, the upstream gradient of value
  const void* grad_entropy = nullptr;  // real, that of entropy
  int64_t grad_stride = 0;             // 1: one number per row; 0: one for all rows
  const void* divisor = nullptr;       // real, what a mean was divided by
  Matrix dx, dt;                       // dx may be x

  // With fewer rows than threads, threads share the column segments of each row.
  ParallelFor split_columns = nullptr;
  void* scratch = nullptr;  // kScratchPerSegment bytes per segment

  // On a GPU, if dx is x: a copy of the logits of the named classes.
  void* overwritten = nullptr;  // real [rows, k]

  // Return 1 / temperature of a row.
  template <class real>
  FD_FN real scale_of(int64_t r) const {
    return row_scale ? static_cast<const real*>(row_scale)[r] : real(scale);
  }
};

// Segments do not depend on the threads, and merge in order.  So the bits of a row depend on
// nothing but the row.
constexpr int64_t kSegment = 8192;
constexpr int64_t kScratchPerSegment = 128;
FD_FN int64_t segment_count(int64_t classes) { return (classes + kSegment - 1) / kSegment; }

}  // namespace fastdiv
