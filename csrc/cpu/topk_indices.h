// Checks the indices of a top-k teacher before they are used.
#pragma once

#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include "losses/row.h"
#include "losses/row_args.h"

namespace fastdiv {

// Checks row after row that all indices are classes and none occurs twice.
class IndexCheck {
 public:
  explicit IndexCheck(const RowArgs& a) : a(a), seen(size_t(a.classes)) {}

  bool passes(int64_t r) {
    if (++row == 0) row = 1, seen.assign(seen.size(), 0);
    const int64_t* indices = row_of(a, r);
    bool ok = true;
    for (int64_t j = 0; j < a.k; ++j) {
      const bool valid = uint64_t(indices[j]) < uint64_t(a.classes);
      uint8_t& last = seen[size_t(valid ? indices[j] : 0)];
      ok &= valid & (last != row);
      last = row;
    }
    return ok;
  }
  static const int64_t* row_of(const RowArgs& a, int64_t r) {
    return static_cast<const int64_t*>(a.indices.data) + r * a.indices.stride;
  }

 private:
  const RowArgs& a;
  std::vector<uint8_t> seen;  // the last row, modulo 255, with each class
  uint8_t row = 0;
};

[[noreturn]] inline void throw_wrong_indices(const RowArgs& a, int64_t r) {
  const int64_t* indices = IndexCheck::row_of(a, r);
  const std::string where = " in row " + std::to_string(r);
  std::vector<bool> seen(size_t(a.classes));
  for (int64_t j = 0;; ++j) {
    const std::string has = "indices has " + std::to_string(indices[j]);
    if (uint64_t(indices[j]) >= uint64_t(a.classes))
      throw std::out_of_range(has + where + ", out of range for " + std::to_string(a.classes) +
                              " classes");
    if (seen[size_t(indices[j])]) throw std::invalid_argument(has + " twice" + where);
    seen[size_t(indices[j])] = true;
  }
}

// Throw for the first row with an index that is out of range or occurs twice.  Ignored rows are not
// checked.
inline void check_indices(const RowArgs& a, ParallelFor parallel_for) {
  struct Task {
    const RowArgs& a;
    std::atomic<int64_t> wrong;
  } task{a, {a.rows}};
  parallel_for(
      0, a.rows, (1 << 15) / a.k + 1,
      [](int64_t begin, int64_t end, void* context) {
        Task& t = *static_cast<Task*>(context);
        const bool f64 = t.a.dtype == DType::kF64;
        IndexCheck check(t.a);
        for (int64_t r = begin; r < end; ++r) {
          const bool counts = f64 ? RowWeight<double>::of(t.a, r).weight != 0
                                  : RowWeight<float>::of(t.a, r).weight != 0;
          if (!counts || check.passes(r)) continue;
          for (int64_t first = t.wrong; r < first && !t.wrong.compare_exchange_weak(first, r);) {
          }
          return;
        }
      },
      &task);
  if (task.wrong < a.rows) throw_wrong_indices(a, task.wrong);
}

}  // namespace fastdiv
