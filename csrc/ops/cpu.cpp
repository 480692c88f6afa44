// The private ops on a CPU: divides the work, checks labels, sums over rows.
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"
#include "cpu/memory.h"
#include "cpu/named_indices.h"
#include "losses/row.h"
#include "ops/call.h"

namespace fastdiv {
namespace {

void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                  void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
}

// Sum in double and in order, which gives the same bits for any number of threads.
template <class real>
void sum_rows(const RowArgs& a, bool mean, double batch, void* value, void* divisor) {
  double sum = 0, weights = 0;
  for (int64_t r = 0; r < a.rows; ++r) {
    sum += double(static_cast<const real*>(a.value)[r]);
    if (mean) weights += double(RowWeight<real>::of(a, r).in_mean(a));
  }
  const double over = mean ? weights : batch;
  *static_cast<real*>(value) = real(sum / over);
  *static_cast<real*>(divisor) = real(over);
}

struct CpuDevice {
  using Kernels = RowKernels;
  static constexpr bool kKeepsOverwritten = false;
  static constexpr int32_t index = 0;

  explicit CpuDevice(const Tensor&) {}

  static int32_t type() { return aoti_torch_device_type_cpu(); }
  static const RowKernels* find(LossId loss, Target target, DType dtype) {
    return instruction_set().find(loss, target, dtype == DType::kF64);
  }
  static void before_first_write(void* data, int64_t bytes) { advise_huge_pages(data, bytes); }
  // Return a matrix like this one in the memory of an earlier gradient, if that is kept.
  static OptionalTensor warm_gradient(const Tensor& of) {
    const int64_t bytes = of.numel() * size_of(dtype_of(of));
    void* const memory = warm::take(bytes);
    if (!memory) return std::nullopt;
    const int64_t size[] = {of.size(0), of.size(1)}, stride[] = {of.size(1), 1};
    return torch::stable::from_blob(
        memory, {size, 2}, {stride, 2}, torch::stable::Device(torch::headeronly::DeviceType::CPU),
        of.scalar_type(), [bytes](void* m) { warm::give_back(m, bytes); });
  }

  // Divide the rows among the threads; with too few rows, the column segments of each row.
  static void run(RowKernel kernel, RowArgs& args) {
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

  static void check_labels(const RowArgs& a) {
    if (a.k) check_indices(a, parallel_for);
    if (!a.labels) return;
    for (int64_t r = 0; r < a.rows; ++r) {
      const int64_t y = a.labels[r];
      if ((y >= 0 && y < a.classes) || y == a.ignore_index) continue;
      const bool is_index = a.params.loss == LossId::k_log_prob_and_entropy;
      throw std::out_of_range(
          (is_index ? "index[" : "target[") + std::to_string(r) + "] is " + std::to_string(y) +
          ", out of range for " + std::to_string(a.classes) + " classes" +
          (is_index ? " (-1 is padding)"
                    : " (ignore_index is " + std::to_string(a.ignore_index) + ")"));
    }
  }

  static void clear(const Tensor& number) {
    std::memset(number.data_ptr(), 0, number.scalar_type() == ScalarType::Double ? 8 : 4);
  }
  static void reduce(const RowArgs& a, bool mean, double batch, void* value, void* divisor) {
    (a.dtype == DType::kF64 ? sum_rows<double> : sum_rows<float>)(a, mean, batch, value, divisor);
  }
};

}  // namespace
}  // namespace fastdiv

STABLE_TORCH_LIBRARY_IMPL(fastdiv, CPU, m) { fastdiv::register_ops<fastdiv::CpuDevice>(m); }
