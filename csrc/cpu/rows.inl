// The three skeletons over the rows of a matrix, for any policy of csrc/losses.
// Included once per instruction set, by rows_*.cpp, as namespace FD_ISA.

namespace fastdiv {
namespace FD_ISA {

#include "cpu/tiles.inl"
#include "cpu/row_source.inl"
#include "cpu/divergence.inl"

// --- forward ----------------------------------------------------------------------------------

template <class P, class real>
RowState<P> first_sweep(const RowSource<P>& source, int64_t r, real scale) {
  return source.over_segments(
      [&](int64_t begin, int64_t end) {
        RowState<P> s;
        Buffer<real> bx, bt;
        source.for_tiles(begin, end, [&](int64_t i, int n) {
          const Tile<real> tile{source.input(r).tile(i, n, bx),
                                source.kTeacher ? source.target(r).tile(i, n, bt) : nullptr,
                                P::kWeights ? source.weights(i) : nullptr, n};
          s.push(source.loss, tile, scale);
        });
        return s;
      },
      [&](RowState<P>& total, const RowState<P>& part) { total.merge(source.loss, part, scale); });
}

// The first column that holds the maximum, or NaN.
template <class P, class real>
int64_t first_maximum(const RowSource<P>& source, int64_t r, real max) {
  Buffer<real> b;
  for (int64_t i = 0; i < source.a.classes; i += kTile) {
    const int n = int(source.a.classes - i < kTile ? source.a.classes - i : kTile);
    const real* x = source.input(r).tile(i, n, b);
    for (int j = 0; j < n; ++j)
      if (x[j] == max || x[j] != x[j]) return i + j;
  }
  return 0;
}

template <class P, class real>
void set_stats(const RowSource<P>& source, int64_t r, const RowState<P>& s, real log_prob,
               const Row<real>& row) {
  const RowArgs& a = source.a;
  real* stats = static_cast<real*>(a.stats);
  stats[r] = row.x_max * source.scale + row.x_logz;
  stats[a.rows + r] = entropy_of(s.x, s.sums.c, row);
  stats[2 * a.rows + r] = log_prob;
  a.argmax[r] = first_maximum(source, r, row.x_max);
}

template <class P>
void forward_row(const RowSource<P>& source, int64_t r) {
  using real = typename P::real;
  Row<real>& record = source.record(r);
  const real weight = source.row_weight(r);
  const bool counts = weight != real(0);
  Outputs<real> out{0, 0};
  Row<real> row{};
  if (counts || P::kStats) {
    const RowState<P> s = first_sweep(source, r, source.scale);
    row = s.row();
    const Label<real> y = counts ? source.label(r, row) : Label<real>{0, 0};
    if constexpr (P::kDivergence)
      out.value = divergence(source, r, s, row);
    else
      out = source.loss.finish(s.x, s.sums, y, source.scale, row);
    if constexpr (P::kStats) {
      const real log_prob = P::kLabel ? (counts ? y.lx - row.x_logz : real(0))
                                      : s.sums.d - mass_times(row.mass, row.x_logz);
      set_stats(source, r, s, log_prob, row);
    }
  }
  record = counts ? row : Row<real>{};
  static_cast<real*>(source.a.value)[r] = counts ? out.value * weight : real(0);
  if (P::kTwoOutputs)
    static_cast<real*>(source.a.entropy)[r] = counts ? out.entropy * weight : real(0);
}

// --- backward ---------------------------------------------------------------------------------

template <class P, class real>
void grad_x(const RowSource<P>& source, int64_t r, int64_t i, int n, Outputs<real> g, real* dx) {
  Buffer<real> bx, bt;
  const real* x = source.input(r).tile(i, n, bx);
  const real* t = source.kTeacher ? source.target(r).tile(i, n, bt) : nullptr;
  const real* w = P::kWeights ? source.weights(i) : nullptr;
  // Copies, which the compiler can keep in registers.
  const Row<real> row = source.record(r);
  const P loss = source.loss;
  const real scale = source.scale;
  const Outputs<real> gx{g.value * scale, g.entropy * scale};
  FD_SIMD()
  for (int j = 0; j < n; ++j) {
    if constexpr (P::kDivergence) {
      const Pair<real> c = make_pair<P::kTarget>(x[j], t[j], scale, row);
      dx[j] = gx.value * (loss.terms(c).u - c.q * row.a);
    } else {
      const real lq = (x[j] - row.x_max) * scale - row.x_logz;
      dx[j] = loss.grad_x(lq, exp_neg(lq), source.kTeacher ? t[j] : real(0),
                          P::kWeights ? w[j] : real(1), row, gx);
    }
  }
  if constexpr (P::kLabel) {
    const int64_t y = source.a.label[r] - i;
    if (y >= 0 && y < n) dx[y] += loss.grad_label(row, gx);
  }
  if (source.a.softcap != 0) {
    const Softcap<real> cap = source.input(r).softcap;
    const real* raw = source.input(r).raw(i, n, bx);
    FD_SIMD()
    for (int j = 0; j < n; ++j) dx[j] *= cap.slope(raw[j]);
  }
}

template <class P, class real>
void grad_t(const RowSource<P>& source, int64_t r, int64_t i, int n, real g, real* dt) {
  Buffer<real> bx, bt;
  const real *x = source.input(r).tile(i, n, bx), *t = source.target(r).tile(i, n, bt);
  const real* w = P::kWeights ? source.weights(i) : nullptr;
  const Row<real> row = source.record(r);
  const P loss = source.loss;
  const real scale = source.scale;
  FD_SIMD()
  for (int j = 0; j < n; ++j) {
    if constexpr (P::kDivergence) {
      const Pair<real> c = make_pair<P::kTarget>(x[j], t[j], scale, row);
      const real v = loss.terms(c).v, shift = real(P::kShift);
      if constexpr (P::kTarget == Target::kLogits) dt[j] = g * scale * (v - c.p * row.b);
      if constexpr (P::kTarget == Target::kLogProbs) dt[j] = g * (v + shift * c.p);
      if constexpr (P::kTarget == Target::kProbs)
        dt[j] = t[j] == real(0) ? real(0) : g * (v / t[j] + shift);
    } else {
      dt[j] = loss.grad_t((x[j] - row.x_max) * scale - row.x_logz, w[j], g);
    }
  }
}

// Zeros where the row does not count or nothing comes from upstream, whatever the row holds.
template <class P>
void backward_row(const RowSource<P>& source, int64_t r) {
  using real = typename P::real;
  const RowArgs& a = source.a;
  const real weight = source.row_weight(r);
  const real total = a.total ? *static_cast<const real*>(a.total) : real(1);
  const auto upstream = [&](const void* grad) {
    if (!grad || weight == real(0)) return real(0);
    const real g = static_cast<const real*>(grad)[r * a.grad_stride] * weight;
    return a.total ? g / total : g;
  };
  const Outputs<real> g{upstream(a.grad), upstream(a.grad_entropy)};
  const bool zero = g.value == real(0) && g.entropy == real(0);
  const auto write = [&](const RowWriter<real>& out, int64_t i, int n, auto gradient) {
    Buffer<real> b;
    real* d = out.begin(i, b);
    if (zero)
      for (int j = 0; j < n; ++j) d[j] = real(0);
    else
      gradient(d);
    out.end(i, n, d);
  };
  source.for_segments([&](int64_t, int64_t begin, int64_t end) {
    source.for_tiles(begin, end, [&](int64_t i, int n) {
      // First the target's, since the input's may be written over the input.
      if constexpr (P::kTarget != Target::kNone)
        if (a.dt.data)
          write(source.output(a.dt, r, true), i, n,
                [&](real* dt) { grad_t(source, r, i, n, g.value, dt); });
      if (a.dx.data)
        write(source.output(a.dx, r, a.softcap == 0), i, n,
              [&](real* dx) { grad_x(source, r, i, n, g, dx); });
    });
  });
}

// --- kernels ----------------------------------------------------------------------------------

template <class P>
void forward_rows(const RowArgs& a, int64_t begin, int64_t end) {
  const RowSource<P> source(a);
  for (int64_t r = begin; r < end; ++r) forward_row(source, r);
}
template <class P>
void backward_rows(const RowArgs& a, int64_t begin, int64_t end) {
  const RowSource<P> source(a);
  for (int64_t r = begin; r < end; ++r) backward_row(source, r);
}
template <class P>
void forward_grad_rows(const RowArgs& a, int64_t begin, int64_t end) {
  const RowSource<P> source(a);
  for (int64_t r = begin; r < end; ++r) forward_row(source, r), backward_row(source, r);
}

template <class P>
const RowKernels* kernels_of() {
  static constexpr RowKernels kernels{forward_rows<P>, backward_rows<P>, forward_grad_rows<P>,
                                      P::kLabel,       P::kTwoOutputs,   P::kStats};
  return &kernels;
}

template <class real>
const RowKernels* find(LossId loss, Target target) {
  switch (loss) {
#define FD_CASE(name, ...) \
  case LossId::k_##name:   \
    return target == __VA_ARGS__::kTarget ? kernels_of<__VA_ARGS__>() : nullptr;
    FD_ROW_LOSSES(FD_CASE)
#undef FD_CASE
#define FD_CASE(name, policy)                                                            \
  case LossId::k_##name:                                                                 \
    return target == Target::kLogits     ? kernels_of<policy<real, Target::kLogits>>()   \
           : target == Target::kLogProbs ? kernels_of<policy<real, Target::kLogProbs>>() \
           : target == Target::kProbs    ? kernels_of<policy<real, Target::kProbs>>()    \
                                         : nullptr;
    FD_DIVERGENCES(FD_CASE)
#undef FD_CASE
    default:
      return nullptr;
  }
}

}  // namespace FD_ISA
}  // namespace fastdiv
