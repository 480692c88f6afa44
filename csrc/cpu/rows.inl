// The kernels over rows, for any policy of csrc/losses.  Included once per instruction set, by
// rows_*.cpp, as namespace FD_ISA.

namespace fastdiv {
namespace FD_ISA {

#include "cpu/tiles.inl"
#include "cpu/lane_sums.inl"
#include "cpu/exponentials.inl"
#include "cpu/row_source.inl"
#include "cpu/first_pass.inl"
#include "cpu/named.inl"

// --- forward ----------------------------------------------------------------------------------

template <class PairOf, Target kTarget, bool kKept, class real>
FD_FN PairOf pair_of(real x, real t, real q, real p, real scale, const PairRecord<real>& row) {
  if constexpr (!kKept)
    return PairOf::template of<kTarget>(x, t, scale, row);
  else
    return PairOf::template of_masses<kTarget>(q, kTarget == Target::kProbs ? t : p, x, t, scale,
                                               row);
}

constexpr int kTermsOfSecondPass = 64 / kLanes;

// The second pass: sum the terms of a divergence over a row that is in the cache.
// kKept: with q and p from the exponentials of the first pass.
template <class PairOf, bool kKept, class P, class L, class real>
TermSums<real> sum_terms_of(const RowSource<P>& source, const L& loss, int64_t r,
                            const PairRecord<real>& row) {
  enum { kF, kU, kV, kQ, kP, kCount };
  using Totals = LaneSums<real, kCount>;
  constexpr bool kAddUp = L::kTermsAddUp && !std::is_same<PairOf, StablePair<real>>::value;
  return source.over_segments(
      [&](int64_t begin, int64_t end) {
        Totals total;
        Buffer<real> bx, bt;
        source.for_tiles(begin, end, [&](int64_t i, int n) {
          const real* x = source.input(r).whole_tile(i, n, bx);
          const real* t = source.target(r).whole_tile(i, n, bt);
          // The compiler can keep copies in registers.
          const PairRecord<real> k = row;
          const L policy = loss;
          const real scale = source.scale(r);
          real q_factor = 1, p_factor = 1;
          const Exponentials<real> kept = kKept ? source.kept.at(i) : source.kept;
          if constexpr (kKept) {
            q_factor = exp_neg((*kept.x_max - row.x_max) * scale) * exp_neg(-row.x_logz);
            p_factor = exp_neg((*kept.t_max - row.t_max) * scale) * exp_neg(-row.t_logz);
          }
          sum_in_runs<kTermsOfSecondPass>(
              whole_vectors(n), total, [=](int at, Totals& run) FD_INLINE {
                const real *xs = x + at, *ts = t + at;
                const real *ex = kKept ? kept.x + at : xs, *et = kKept ? kept.t + at : ts;
                FD_SIMD()
                for (int j = 0; j < kLanes; ++j) {
                  const PairOf pair = pair_of<PairOf, P::kTarget, kKept>(
                      xs[j], ts[j], ex[j] * q_factor, et[j] * p_factor, scale, k);
                  const Terms<real> term = policy.terms(pair);
                  if (!kAddUp) run.lane[kF][j] += term.f;
                  run.lane[kU][j] += term.u, run.lane[kV][j] += term.v;
                  run.lane[kQ][j] += pair.q, run.lane[kP][j] += pair.p;
                }
              });
        });
        const real u = total.sum(kU), v = total.sum(kV), f = kAddUp ? u + v : total.sum(kF);
        return TermSums<real>{f, u, v, total.sum(kQ), total.sum(kP)};
      },
      [](TermSums<real>& total, const TermSums<real>& part) { total.add(part); });
}
template <class P, class L>
auto sum_terms(const RowSource<P>& source, const L& loss, int64_t r,
               const typename P::Record& row) {
  using real = typename P::real;
  using Direct = DirectPair<real, ExactMath>;
  if constexpr (P::kDirectTerms && std::is_same<P, L>::value)
    if (row.use_direct != real(0)) {
      if constexpr (keeps_exponentials<P>())
        if (source.kept.x) return sum_terms_of<Direct, true>(source, loss, r, row);
      return sum_terms_of<Direct, false>(source, loss, r, row);
    }
  return sum_terms_of<StablePair<real>, false>(source, loss, r, row);
}

// Return the first column that holds the maximum or NaN.
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

template <class P>
void forward_row(const RowSource<P>& source, int64_t r) {
  using real = typename P::real;
  if constexpr (P::kNamed) {
    forward_named(source, r);
  } else {
    const RowIO<P> row = source.row(r);
    if (row.weight() == real(0) && !P::kStats) return row.store({});
    const RowState<P> s = first_pass(source, r);
    const real scale = source.scale(r);
    const auto result = row.finish(
        source.loss, s, source.label_logit(r), scale,
        [&](const auto& loss, const auto& record) { return sum_terms(source, loss, r, record); });
    row.store(result);
    if constexpr (P::kStats) row.store_stats(result, s, scale, first_maximum(source, r, s.x.max));
  }
}

// --- backward ---------------------------------------------------------------------------------

// Set the gradient of the classes that take no part to 0, if it is anything else.  Not inlined,
// because few calls have a mask.
template <class P, class real>
__attribute__((noinline)) void mask_gradient(const RowSource<P>& source, int64_t r, int64_t i,
                                             int n, Outputs<real> g, bool capped, real* d) {
  if (masks_gradient<P>(source.row(r).record(), g, capped))
    source.mask(r).select(d, i, n, real(0), d);
}

// add(i, n, dx, g): adds what single classes get.
template <class PairOf, class P, class real, class Add>
void grad_x(const RowSource<P>& source, int64_t r, int64_t i, int n, Outputs<real> g, real* dx,
            const Add& add) {
  Buffer<real> bx, bt;
  const real* x = source.input(r).tile(i, n, bx);
  const real* t = source.kTeacher ? source.target(r).tile(i, n, bt) : nullptr;
  const real* w = P::kWeights ? source.weights(i) : nullptr;
  // The compiler can keep copies in registers.
  const typename P::Record row = source.row(r).record();
  const P loss = source.loss;
  const real scale = source.scale(r);
  const Outputs<real> gx{g.value * scale, g.entropy * scale};
  FD_SIMD()
  for (int j = 0; j < n; ++j)
    dx[j] = grad_of_input<PairOf, ExactMath>(loss, x[j], source.kTeacher ? t[j] : real(0),
                                             P::kWeights ? w[j] : real(1), row, gx, scale);
  add(i, n, dx, gx);
  if (P::kSoftcap && source.a.softcap != 0) {
    const Softcap<real> cap = source.input(r).softcap;
    const real* raw = source.input(r).raw(i, n, bx);
    FD_SIMD()
    for (int j = 0; j < n; ++j) dx[j] *= cap.slope(raw[j]);
  }
  if (source.mask(r).data) mask_gradient(source, r, i, n, gx, source.a.softcap != 0, dx);
}

template <class PairOf, class P, class real>
void grad_t(const RowSource<P>& source, int64_t r, int64_t i, int n, real g, real* dt) {
  Buffer<real> bx, bt;
  const real *x = source.input(r).tile(i, n, bx), *t = source.target(r).tile(i, n, bt);
  const real* w = P::kWeights ? source.weights(i) : nullptr;
  const typename P::Record row = source.row(r).record();
  const P loss = source.loss;
  const real scale = source.scale(r);
  FD_SIMD()
  for (int j = 0; j < n; ++j)
    dt[j] = grad_of_target<PairOf>(loss, x[j], t[j], P::kWeights ? w[j] : real(1), row, g, scale);
  if (source.mask(r).data) mask_gradient(source, r, i, n, Outputs<real>{g, real(0)}, false, dt);
}

// A masked tile is read before it is computed, so memory waits for it.  While few columns are
// computed, those that follow come into the cache.
constexpr int kMaskedTile = 256;

// Write the gradients of a row.  zero: they are 0, whatever the row holds.
template <class PairOf, class P, class real, class Add>
void backward_row_of(const RowSource<P>& source, int64_t r, Outputs<real> g, bool zero,
                     const Add& add) {
  const RowArgs& a = source.a;
  const auto write = [&](const RowWriter<real>& out, int64_t i, int n, auto gradient) {
    Buffer<real> b;
    real* d = out.begin(i, b);
    if (zero)
      for (int j = 0; j < n; ++j) d[j] = real(0);
    else
      gradient(d);
    out.end(i, n, d);
  };
  const auto tile = [&](int64_t i, int n) {
    // The target comes first, because the gradient of the input may overwrite the input.
    if constexpr (P::kTarget != Target::kNone)
      if (a.dt.data)
        write(source.output(a.dt, r, true), i, n,
              [&](real* dt) { grad_t<PairOf>(source, r, i, n, g.value, dt); });
    if (a.dx.data)
      write(source.output(a.dx, r, a.softcap == 0), i, n,
            [&](real* dx) { grad_x<PairOf>(source, r, i, n, g, dx, add); });
  };
  const int columns = a.mask.data ? kMaskedTile : kTile;
  source.for_segments(
      [&](int64_t, int64_t begin, int64_t end) { source.for_tiles(begin, end, tile, columns); });
}
template <class P>
void backward_row(const RowSource<P>& source, int64_t r) {
  using real = typename P::real;
  if constexpr (P::kNamed) {
    backward_named(source, r, [&](Outputs<real> g, bool zero, const auto& add) {
      backward_row_of<StablePair<real>>(source, r, g, zero, add);
    });
  } else {
    const Outputs<real> g = source.row(r).upstream();
    const bool zero = g.value == real(0) && g.entropy == real(0);
    const auto add = [&](int64_t i, int n, real* dx, Outputs<real> gx) {
      if constexpr (P::kReadsLabel) {
        const int64_t y = source.a.labels[r], at = y - i;
        const bool here = at >= 0 && at < n && (!source.mask(r).data || source.mask(r).has(y));
        if (here) dx[at] += source.loss.grad_label(source.row(r).record(), gx);
      }
    };
    if constexpr (P::kDirectTerms)
      if (source.row(r).record().use_direct != real(0))
        return backward_row_of<DirectPair<real, ExactMath>>(source, r, g, zero, add);
    backward_row_of<StablePair<real>>(source, r, g, zero, add);
  }
}

// --- kernels ----------------------------------------------------------------------------------

template <class P>
void forward_rows(const RowArgs& a, int64_t begin, int64_t end) {
  const RowSource<P> source(a, true);
  for (int64_t r = begin; r < end; ++r) forward_row(source, r);
}
template <class P>
void backward_rows(const RowArgs& a, int64_t begin, int64_t end) {
  const RowSource<P> source(a);
  for (int64_t r = begin; r < end; ++r) backward_row(source, r);
}
template <class P>
void forward_grad_rows(const RowArgs& a, int64_t begin, int64_t end) {
  const RowSource<P> source(a, true);
  for (int64_t r = begin; r < end; ++r) forward_row(source, r), backward_row(source, r);
}
template <class P>
void terms_rows(const RowArgs& a, int64_t begin, int64_t end) {
  using real = typename P::real;
  const RowSource<P> source(a);
  for (int64_t r = begin; r < end; ++r) {
    const RowIO<P> row = source.row(r);
    TermSums<real> sum;
    if (row.weight() != real(0)) sum = sum_terms(source, source.loss, r, row.record());
    row.store_terms(sum);
  }
}

struct Kernels {
  template <class P>
  static const RowKernels* of() {
    static constexpr RowKernels kernels = make<P>();
    return &kernels;
  }

 private:
  template <class P>
  static constexpr RowKernels make() {
    RowKernels k{forward_rows<P>, nullptr, nullptr, nullptr, traits_of<P>()};
    if constexpr (!P::kStats) k.backward = backward_rows<P>;
    if constexpr (!P::kStats && !P::kNamed) k.forward_grad = forward_grad_rows<P>;
    if constexpr (has_terms<P>()) k.terms = terms_rows<P>;
    return k;
  }
};

}  // namespace FD_ISA
}  // namespace fastdiv
