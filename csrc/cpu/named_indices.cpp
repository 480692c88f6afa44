#include "cpu/named_indices.h"

#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include "losses/row.h"

namespace fastdiv {
namespace {

bool is_wrong(const RowArgs& a, int64_t index) {
  return index != kNoClass && uint64_t(index) >= uint64_t(a.classes);
}

// Checks row after row.
class IndexCheck {
 public:
  explicit IndexCheck(const RowArgs& a)
      : a(a), seen(names_once(a.params.loss) ? size_t(a.classes) : 0) {}

  bool passes(int64_t r) {
    if (++row == 0) row = 1, seen.assign(seen.size(), 0);
    bool ok = true;
    for (int64_t j = 0; j < a.k; ++j) {
      const int64_t index = a.indices.at(r, j);
      if (is_wrong(a, index)) return false;
      if (index == kNoClass || seen.empty()) continue;
      ok &= seen[size_t(index)] != row;
      seen[size_t(index)] = row;
    }
    return ok;
  }

 private:
  const RowArgs& a;
  std::vector<uint8_t> seen;  // the last row, modulo 255, with each class
  uint8_t row = 0;
};

[[noreturn]] void throw_wrong_indices(const RowArgs& a, int64_t r) {
  const bool once = names_once(a.params.loss);
  const std::string where = " in row " + std::to_string(r);
  std::vector<bool> seen(size_t(a.classes));
  for (int64_t j = 0;; ++j) {
    const int64_t index = a.indices.at(r, j);
    const std::string has = (once ? "indices has " : "index has ") + std::to_string(index);
    if (is_wrong(a, index))
      throw std::out_of_range(has + where + ", out of range for " + std::to_string(a.classes) +
                              " classes (-1 is padding)");
    if (index == kNoClass) continue;
    if (once && seen[size_t(index)]) throw std::invalid_argument(has + " twice" + where);
    seen[size_t(index)] = true;
  }
}

template <class real>
bool counts(const RowArgs& a, int64_t r) {
  return RowWeight<real>::of(a, r).weight != 0;
}

}  // namespace

void check_indices(const RowArgs& a, ParallelFor parallel_for) {
  struct Task {
    const RowArgs& a;
    std::atomic<int64_t> wrong;
  } task{a, {a.rows}};
  parallel_for(
      0, a.rows, (1 << 15) / (a.k + 1) + 1,
      [](int64_t begin, int64_t end, void* context) {
        Task& t = *static_cast<Task*>(context);
        const bool f64 = t.a.dtype == DType::kF64;
        IndexCheck check(t.a);
        for (int64_t r = begin; r < end; ++r) {
          if (!(f64 ? counts<double>(t.a, r) : counts<float>(t.a, r)) || check.passes(r)) continue;
          for (int64_t first = t.wrong; r < first && !t.wrong.compare_exchange_weak(first, r);) {
          }
          return;
        }
      },
      &task);
  if (task.wrong < a.rows) throw_wrong_indices(a, task.wrong);
}

}  // namespace fastdiv
