// The three skeletons over the rows of a matrix, for any policy of csrc/losses.
// Included once per instruction set, by rows_*.cpp, as namespace FD_ISA.

namespace fastdiv {
namespace FD_ISA {

#include "cpu/tiles.inl"

// Calls body(s) for every column segment: in order, or shared out over the threads.
template <class Body>
void for_segments(const RowArgs& a, Body body) {
  const int64_t count = segment_count(a.classes);
  if (a.split_columns == nullptr) {
    for (int64_t s = 0; s < count; ++s) body(s);
    return;
  }
  a.split_columns(
      0, count, 1,
      [](int64_t begin, int64_t end, void* context) {
        for (int64_t s = begin; s < end; ++s) (*static_cast<Body*>(context))(s);
      },
      &body);
}

// What part(begin, end) gives for each segment, merged in order whoever computed it.
template <class Part, class Make, class Merge>
Part over_segments(const RowArgs& a, Make make, Merge merge) {
  static_assert(sizeof(Part) <= kScratchPerSegment, "scratch too small");
  Part total;
  const auto part = [&](int64_t s) {
    const int64_t begin = s * kSegment, end = begin + kSegment;
    return make(begin, end < a.classes ? end : a.classes);
  };
  if (a.split_columns == nullptr) {
    total = part(0);
    for (int64_t s = 1; s < segment_count(a.classes); ++s) merge(total, part(s));
  } else {
    Part* parts = static_cast<Part*>(a.scratch);
    for_segments(a, [&](int64_t s) { parts[s] = part(s); });
    total = parts[0];
    for (int64_t s = 1; s < segment_count(a.classes); ++s) merge(total, parts[s]);
  }
  return total;
}

template <class P>
class Rows {
 public:
  using real = typename P::real;
  static constexpr Target kTarget = P::kTarget;
  static constexpr bool kTeacher = kTarget != Target::kNone;

  explicit Rows(const RowArgs& args)
      : a(args),
        loss(args.params),
        scale(real(args.scale)),
        convert(converters(args.dtype, real())),
        class_weight(static_cast<const real*>(args.class_weight)) {
    if (P::kWeights && !class_weight)
      for (int i = 0; i < kTile && i < a.classes; ++i) ones.data[i] = real(1);
  }

  void forward(int64_t r) const {
    Row<real>& row = record(r);
    const real u = row_weight(r);
    row = {};
    if (u == real(0) && !P::kStats) return set_outputs(r, {0, 0});
    const auto s = over_segments<RowState<P>>(
        a, [&](int64_t begin, int64_t end) { return first_sweep(r, begin, end); },
        [&](RowState<P>& total, const RowState<P>& part) { total.merge(loss, part, scale); });
    row = s.row();
    const Label<real> y = label(r, row, u);
    Outputs<real> out;
    if constexpr (P::kDivergence)
      out = {divergence(r, s, row), 0};
    else
      out = loss.finish(s.x, s.sums, y, scale, row);
    if constexpr (P::kStats) set_stats(r, s, y, row);
    if (u == real(0)) return row = {}, set_outputs(r, {0, 0});
    set_outputs(r, {out.value * u, out.entropy * u});
  }

  // Writes zeros where the row does not count or nothing comes from upstream, whatever it holds.
  void backward(int64_t r) const {
    const real u = row_weight(r);
    const real total = a.total ? *static_cast<const real*>(a.total) : real(1);
    const auto upstream = [&](const void* grad) {
      if (!grad || u == real(0)) return real(0);
      const real g = static_cast<const real*>(grad)[r * a.grad_stride];
      return a.total ? g * u / total : g * u;
    };
    const Outputs<real> g{upstream(a.grad), upstream(a.grad_entropy)};
    const bool zero = g.value == real(0) && g.entropy == real(0);
    for_segments(a, [&](int64_t s) {
      const int64_t end = (s + 1) * kSegment;
      for (int64_t i = s * kSegment; i < a.classes && i < end; i += kTile) {
        const int n = int(a.classes - i < kTile ? a.classes - i : kTile);
        if (a.dt.data) grad_t(r, i, n, g.value, zero);  // first: dx may be written over x
        if (a.dx.data) grad_x(r, i, n, g, zero);
      }
    });
  }

 private:
  const RowArgs& a;
  const P loss;
  const real scale;
  const Converters<real> convert;
  const real* class_weight;
  Buffer<real> ones;

  const void* at(const Matrix& m, int64_t r) const {
    return static_cast<const char*>(m.data) + r * m.stride * size_of(a.dtype);
  }
  RowReader<real> input(int64_t r) const { return {at(a.x, r), convert.load, {real(a.softcap)}}; }
  RowReader<real> target(int64_t r) const { return {at(a.t, r), convert.load, {real(0)}}; }
  const real* weights(int64_t i) const { return class_weight ? class_weight + i : ones.data; }
  Row<real>& record(int64_t r) const { return static_cast<Row<real>*>(a.record)[r]; }

  // 0: the row does not count.
  real row_weight(int64_t r) const {
    if (P::kLabel && a.label[r] == a.ignore_index) return real(0);
    return a.row_weight ? static_cast<const real*>(a.row_weight)[r] : real(1);
  }

  Label<real> label(int64_t r, const Row<real>& row, real u) const {
    if (!P::kLabel || u == real(0)) return {0, 0};
    Buffer<real> b;
    const int64_t y = a.label[r];
    const real x = *input(r).tile(y, 1, b);
    return {(x - row.x_max) * scale, class_weight ? class_weight[y] : real(1)};
  }

  void set_outputs(int64_t r, Outputs<real> out) const {
    static_cast<real*>(a.value)[r] = out.value;
    if (P::kTwoOutputs) static_cast<real*>(a.entropy)[r] = out.entropy;
  }

  RowState<P> first_sweep(int64_t r, int64_t begin, int64_t end) const {
    RowState<P> s;
    Buffer<real> bx, bt;
    for (int64_t i = begin; i < end; i += kTile) {
      const int n = int(end - i < kTile ? end - i : kTile);
      s.push(loss, {input(r).tile(i, n, bx), kTeacher ? target(r).tile(i, n, bt) : nullptr,
                    P::kWeights ? weights(i) : nullptr, n},
             scale);
    }
    return s;
  }

#include "cpu/divergence.inl"

  void set_stats(int64_t r, const RowState<P>& s, Label<real> y, const Row<real>& row) const {
    real* stats = static_cast<real*>(a.stats);
    stats[r] = row.x_max * scale + row.x_logz;
    stats[a.rows + r] = entropy_of(s.x, s.sums.c, row);
    stats[2 * a.rows + r] = kTeacher ? s.sums.d - mass_times(row.mass, row.x_logz)
                            : row_weight(r) == real(0) ? real(0)
                                                       : y.lx - row.x_logz;
    a.argmax[r] = first_maximum(r, row.x_max);
  }
  int64_t first_maximum(int64_t r, real max) const {
    Buffer<real> b;
    for (int64_t i = 0; i < a.classes; i += kTile) {
      const int n = int(a.classes - i < kTile ? a.classes - i : kTile);
      const real* x = input(r).tile(i, n, b);
      for (int j = 0; j < n; ++j)
        if (x[j] == max || x[j] != x[j]) return i + j;
    }
    return 0;
  }

  void grad_x(int64_t r, int64_t i, int n, Outputs<real> g, bool zero) const {
    const bool capped = a.softcap != 0;
    const RowWriter<real> out{static_cast<char*>(a.dx.data) + r * a.dx.stride * size_of(a.dtype),
                              convert, convert.same && !capped};
    Buffer<real> bx, bt, bo;
    real* dx = out.begin(i, bo);
    const Outputs<real> gx{g.value * scale, g.entropy * scale};
    if (zero) {
      for (int j = 0; j < n; ++j) dx[j] = real(0);
    } else {
      const real* x = input(r).tile(i, n, bx);
      const real* t = kTeacher ? target(r).tile(i, n, bt) : nullptr;
      const Row<real> row = record(r);
      if constexpr (P::kDivergence) {
        divergence_grad_x(x, t, dx, n, row, gx.value);
      } else {
        const real* w = P::kWeights ? weights(i) : nullptr;
        const P policy = loss;
        const real k = scale;
        FD_SIMD()
        for (int j = 0; j < n; ++j) {
          const real lq = (x[j] - row.x_max) * k - row.x_logz;
          dx[j] = policy.grad_x(lq, exp_neg(lq), kTeacher ? t[j] : real(0),
                                P::kWeights ? w[j] : real(1), row, gx);
        }
        if constexpr (P::kLabel) {
          const int64_t y = a.label[r] - i;
          if (y >= 0 && y < n) dx[y] += loss.grad_label(row, gx);
        }
      }
      if (capped) {
        const Softcap<real> cap = input(r).softcap;
        const real* raw = input(r).raw(i, n, bx);
        FD_SIMD()
        for (int j = 0; j < n; ++j) dx[j] *= cap.slope(raw[j]);
      }
    }
    out.end(i, n, dx);
  }

  void grad_t(int64_t r, int64_t i, int n, real g, bool zero) const {
    if constexpr (kTeacher) {
      const RowWriter<real> out{static_cast<char*>(a.dt.data) + r * a.dt.stride * size_of(a.dtype),
                                convert, convert.same};
      Buffer<real> bx, bt, bo;
      real* dt = out.begin(i, bo);
      if (zero) {
        for (int j = 0; j < n; ++j) dt[j] = real(0);
      } else {
        const real* x = input(r).tile(i, n, bx);
        const Row<real> row = record(r);
        if constexpr (P::kDivergence) {
          divergence_grad_t(x, target(r).tile(i, n, bt), dt, n, row, g);
        } else {
          const real* w = weights(i);
          const P policy = loss;
          const real k = scale;
          FD_SIMD()
          for (int j = 0; j < n; ++j)
            dt[j] = policy.grad_t((x[j] - row.x_max) * k - row.x_logz, w[j], g);
        }
      }
      out.end(i, n, dt);
    }
  }
};

template <class P>
void forward_rows(const RowArgs& a, int64_t begin, int64_t end) {
  const Rows<P> rows(a);
  for (int64_t r = begin; r < end; ++r) rows.forward(r);
}
template <class P>
void backward_rows(const RowArgs& a, int64_t begin, int64_t end) {
  const Rows<P> rows(a);
  for (int64_t r = begin; r < end; ++r) rows.backward(r);
}
template <class P>
void forward_grad_rows(const RowArgs& a, int64_t begin, int64_t end) {
  const Rows<P> rows(a);
  for (int64_t r = begin; r < end; ++r) rows.forward(r), rows.backward(r);
}

template <class P>
const RowKernels* kernels_of() {
  static constexpr RowKernels kernels{forward_rows<P>, backward_rows<P>, forward_grad_rows<P>};
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
#define FD_CASE(name, policy)                                                                \
  case LossId::k_##name:                                                                     \
    return target == Target::kLogits     ? kernels_of<policy<real, Target::kLogits>>()       \
           : target == Target::kLogProbs ? kernels_of<policy<real, Target::kLogProbs>>()     \
           : target == Target::kProbs    ? kernels_of<policy<real, Target::kProbs>>()        \
                                         : nullptr;
    FD_DIVERGENCES(FD_CASE)
#undef FD_CASE
    default:
      return nullptr;
  }
}

}  // namespace FD_ISA
}  // namespace fastdiv
