// Sums the values of the rows, and the weights that a mean is divided by.
//
// Each block sums a section of the rows, and leaves its totals where the values of these rows were.
// One more block sums the totals.  The order depends only on the number of rows.
#include "cuda/launch.cuh"
#include "cuda/team.cuh"
#include "losses/row.h"

namespace fastdiv {
namespace cuda {
namespace {

struct Totals {
  double value, weight;

  __device__ __forceinline__ void add(const Totals& o) { value += o.value, weight += o.weight; }
};
struct MergeTotals {
  template <class Lanes>
  __device__ __forceinline__ void operator()(Totals& s, const Lanes& lanes) const {
    double sum[] = {s.value, s.weight};
    lanes.template sum<2>(sum);
    s = {sum[0], sum[1]};
  }
};

struct Reduction {
  bool mean;
  double batch;
  void *value, *divisor;  // where the results go

  template <class real>
  __device__ __forceinline__ void store(const Totals& sum) const {
    const double over = mean ? sum.weight : batch;
    *static_cast<real*>(value) = real(sum.value / over);
    *static_cast<real*>(divisor) = real(over);
  }
};

constexpr int kRowsOfSection = 4096;
constexpr int kRowsAtOnce = 16;  // of a thread, whose loads are all under way together

template <class real>
__device__ __forceinline__ Totals* totals_of(const RowArgs& a, int64_t section) {
  return reinterpret_cast<Totals*>(static_cast<real*>(a.value) + section * kRowsOfSection);
}

template <class real>
__global__ void __launch_bounds__(kForwardThreads)
    sum_rows(const __grid_constant__ RowArgs a, const __grid_constant__ Reduction to) {
  Team team(kForwardThreads, 1);
  const real* const values = static_cast<const real*>(a.value);
  const real* const weights = static_cast<const real*>(a.row_weight);
  const int64_t begin = int64_t(blockIdx.x) * kRowsOfSection;
  const int64_t end = blockIdx.x + 1 == gridDim.x ? a.rows : begin + kRowsOfSection;
  Totals sum{0, 0};
  for (int64_t r = begin + team.index; r < end; r += kRowsAtOnce * kForwardThreads) {
    const auto each = [&](auto body) {
      FD_UNROLL
      for (int u = 0; u < kRowsAtOnce; ++u)
        if (r + u * kForwardThreads < end) body(u, r + u * kForwardThreads);
    };
    real value[kRowsAtOnce], weight[kRowsAtOnce];
    int64_t label[kRowsAtOnce] = {};
    each([&](int u, int64_t i) { value[u] = values[i], weight[u] = real(1); });
    if (to.mean && weights) each([&](int u, int64_t i) { weight[u] = weights[i]; });
    if (to.mean && a.labels) each([&](int u, int64_t i) { label[u] = a.labels[i]; });
    each([&](int u, int64_t) {
      const auto own = RowWeight<real>::of(a, label[u], weight[u]);
      sum.add({double(value[u]), double(own.in_mean(a))});
    });
  }
  sum = team.all(sum, MergeTotals());
  if (!team.leads()) return;
  if (gridDim.x == 1)
    to.store<real>(sum);
  else
    *totals_of<real>(a, blockIdx.x) = sum;
}

template <class real>
__global__ void __launch_bounds__(kForwardThreads)
    sum_sections(const __grid_constant__ RowArgs a, const __grid_constant__ Reduction to,
                 int sections) {
  Team team(kForwardThreads, 1);
  Totals sum{0, 0};
  for (int i = team.index; i < sections; i += kForwardThreads) sum.add(*totals_of<real>(a, i));
  sum = team.all(sum, MergeTotals());
  if (team.leads()) to.store<real>(sum);
}

template <class real>
Status reduce(const RowArgs& a, const Reduction& to, void* stream) {
  // The last section takes what is left, so all have room for their totals.
  const int64_t sections = a.rows / kRowsOfSection;
  const Grid grid{sections > 0 ? sections : 1, kForwardThreads, 1, 0, 0};
  const Status status = launch(sum_rows<real>, grid, stream, a, to);
  if (status || sections <= 1) return status;
  const Grid last{1, kForwardThreads, 1, 0, 0};
  return launch(sum_sections<real>, last, stream, a, to, int(sections));
}

}  // namespace

Status reduce_rows(const RowArgs& a, bool mean, double batch, void* value, void* divisor,
                   void* stream) {
  const Reduction to{mean, batch, value, divisor};
  return a.dtype == DType::kF64 ? reduce<double>(a, to, stream) : reduce<float>(a, to, stream);
}

}  // namespace cuda
}  // namespace fastdiv
