// RowArgs: the one interface between the torch side and the kernels of either device.
#pragma once

#include "losses/loss.h"

namespace fastdiv {

enum class DType : int { kF32 = 0, kF64 = 1, kF16 = 2, kBF16 = 3 };

FD_FN int64_t size_of(DType d) { return d == DType::kF64 ? 8 : (d == DType::kF32 ? 4 : 2); }

// A matrix of logits or of a target, rows at any stride, classes contiguous.
struct Matrix {
  void* data = nullptr;
  int64_t stride = 0;  // in elements
};

// torch's thread pool: body(begin, end, context) over pieces of [begin, end).
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain,
                             void (*body)(int64_t, int64_t, void*), void* context);

// `real` is float, and double where the logits are double.  Pointers that do not apply are null.
struct RowArgs {
  int64_t rows = 0, classes = 0;
  DType dtype = DType::kF32;  // of x, t, dx and dt
  Matrix x, t;
  // Of a teacher known at k classes: t and dt are [rows, k], of a dtype of their own.
  int64_t k = 0;
  DType t_dtype = DType::kF32;
  Matrix indices;                      // int64 [rows, k]
  const int64_t* labels = nullptr;     // [rows]
  int64_t ignore_index = 0;            // a label that makes its row not count
  const void* class_weight = nullptr;  // real [classes]
  const void* row_weight = nullptr;    // real [rows]; 0: the row does not count
  double scale = 1;                    // 1 / temperature: of x, and of t where that is logits
  double softcap = 0;                  // 0: none
  LossParams params{};

  // forward
  void* value = nullptr;      // real [rows], times the row weight
  void* entropy = nullptr;    // real [rows], second output, where there are two
  void* record = nullptr;     // P::Record [rows]: written by the forward, read by the backward
  void* stats = nullptr;      // real [3, rows]: lse, entropy, log_prob
  int64_t* argmax = nullptr;  // [rows]

  void* terms = nullptr;  // TermSums<real> [rows]: what a second pass adds up

  // backward
  const void* grad = nullptr;          // real: upstream gradient of value
  const void* grad_entropy = nullptr;  // real: of entropy
  int64_t grad_stride = 0;             // 1: one a row;  0: the same for all
  const void* divisor = nullptr;       // real: what a mean was divided by
  Matrix dx, dt;                       // dx may be x itself

  // Where rows are fewer than threads, each row's column segments are shared out.
  ParallelFor split_columns = nullptr;
  void* scratch = nullptr;  // kScratchPerSegment bytes a segment

  // On a GPU, where dx is x: what k classes hold before it is overwritten.
  void* overwritten = nullptr;  // real [rows, k]
};

// Segments are the same whoever works on them, and merge in order: the bits of a row depend on
// nothing but the row.
constexpr int64_t kSegment = 8192;
constexpr int64_t kScratchPerSegment = 128;
FD_FN int64_t segment_count(int64_t classes) { return (classes + kSegment - 1) / kSegment; }

}  // namespace fastdiv
