// Sums the values of the rows, and the weights that a mean is divided by.  One block does it, in an
// order that depends only on the number of rows.
#include "cuda/launch.cuh"
#include "cuda/team.cuh"
#include "losses/row.h"

namespace fastdiv {
namespace cuda {
namespace {

struct Totals {
  double value, weight;
};
struct MergeTotals {
  __device__ __forceinline__ void operator()(Totals& s, int width) const {
    double sum[] = {s.value, s.weight};
    sum_lanes<2>(sum, width);
    s = {sum[0], sum[1]};
  }
};

constexpr int kThreads = 1024;

template <class real>
__global__ void __launch_bounds__(kThreads)
    reduce(const __grid_constant__ RowArgs a, bool mean, double batch, real* value, real* divisor) {
  Team team{kThreads, 1, int(threadIdx.x), 0};
  Totals sum{0, 0};
  for (int64_t r = threadIdx.x; r < a.rows; r += kThreads) {
    sum.value += double(static_cast<const real*>(a.value)[r]);
    if (mean) sum.weight += double(weight_in_mean<real>(a, r));
  }
  sum = team.all(sum, MergeTotals());
  if (!team.leads()) return;
  const double over = mean ? sum.weight : batch;
  *value = real(sum.value / over);
  *divisor = real(over);
}

}  // namespace

Status reduce_rows(const RowArgs& a, bool mean, double batch, void* value, void* divisor,
                   void* stream) {
  const Grid grid{1, kThreads, 1, 0, 0};
  if (a.dtype == DType::kF64)
    return launch(reduce<double>, grid, stream, a, mean, batch, static_cast<double*>(value),
                  static_cast<double*>(divisor));
  return launch(reduce<float>, grid, stream, a, mean, batch, static_cast<float*>(value),
                static_cast<float*>(divisor));
}

}  // namespace cuda
}  // namespace fastdiv
