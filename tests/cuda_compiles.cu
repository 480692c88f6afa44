// The shared layers, csrc/common and csrc/losses, as device code: every policy, float and double.
// Compiled by test_build_contract.py, never run.
#include "common/launch.h"
#include "common/registry.h"

using namespace fastdiv;

constexpr int kColumns = 8;

// One thread a row: what a kernel does with a policy, from tiles to gradients.
template <class P>
__global__ void one_row(RowArgs a, typename P::real* out) {
  using real = typename P::real;
  const P loss(a.params);
  const real scale = real(a.scale);
  const Softcap<real> cap{real(a.softcap)};
  real x[kColumns], t[kColumns], weights[kColumns];
  for (int i = 0; i < kColumns; ++i) {
    x[i] = cap.value(static_cast<const real*>(a.x.data)[threadIdx.x + i * 32]);
    t[i] = static_cast<const real*>(a.t.data)[threadIdx.x + i * 32];
    weights[i] = real(1);
  }
  RowState<P> state, other;
  state.push(loss, {x, t, weights, kColumns}, scale);
  other.push(loss, {t, x, weights, kColumns}, scale);
  state.merge(loss, other, scale);
  Row<real> row = state.row();
  const Outputs<real> g{real(1), real(2)};
  if constexpr (P::kDivergence) {
    for (int i = 0; i < kColumns; ++i) {
      const auto pair = make_pair<P::kTarget>(x[i], t[i], scale, row);
      const auto terms = loss.terms(pair);
      row.a += terms.u, row.b += terms.v;
      out[i] = terms.f + terms.u - pair.q * row.a;
    }
  } else {
    const auto value = loss.finish(state.x, state.sums, {x[0], weights[0]}, scale, row);
    for (int i = 0; i < kColumns; ++i) {
      const real lq = (x[i] - row.x_max) * scale - row.x_logz;
      real dx = loss.grad_x(lq, exp_neg(lq), t[i], weights[i], row, g) * cap.slope(x[i]);
      if constexpr (P::kLabel) dx += loss.grad_label(row, g);
      if constexpr (P::kTarget != Target::kNone) dx += loss.grad_t(lq, weights[i], g.value);
      out[i] = value.value + value.entropy + dx;
    }
  }
}

template <class real>
void launch_all(const RowArgs& a, real* out) {
#define FD_LAUNCH(name, ...) one_row<__VA_ARGS__><<<1, 32>>>(a, out);
  FD_ROW_LOSSES(FD_LAUNCH)
#undef FD_LAUNCH
#define FD_LAUNCH(name, policy)                                \
  one_row<policy<real, Target::kLogits>><<<1, 32>>>(a, out);   \
  one_row<policy<real, Target::kLogProbs>><<<1, 32>>>(a, out); \
  one_row<policy<real, Target::kProbs>><<<1, 32>>>(a, out);
  FD_DIVERGENCES(FD_LAUNCH)
#undef FD_LAUNCH
}

template void launch_all<float>(const RowArgs&, float*);
template void launch_all<double>(const RowArgs&, double*);
