// The k classes of a row with a top-k teacher (topk.h).  Part of rows.inl: compiled once per
// instruction set.

template <class P>
class TopKClasses {
  using real = typename P::real;

 public:
  TopKClasses(const RowSource<P>& source, int64_t r)
      : source(source),
        a(source.a),
        r(r),
        indices(static_cast<const int64_t*>(a.indices.data) + r * a.indices.stride),
        convert(converters(a.t_dtype, real())) {}

  real largest_value() const {
    real most = Limits<real>::lowest;
    for_tiles([&](int64_t, int n, const real*, const real* v) { most = max_of(v, n, most); });
    return most;
  }

  template <class Term>
  TopKSums<real> sum(const Term& term_of) const {
    TopKSums<real> total;
    for_tiles([&](int64_t, int n, const real* x, const real* v) {
      const Term term = term_of;  // the compiler can keep a copy in registers
      real f = 0, slopes = 0;
      double mass = 0;
      FD_SIMD(reduction(+ : f, slopes, mass))
      for (int j = 0; j < n; ++j) {
        const Terms<real> t = term(x[j], v[j]);
        f += t.f, slopes += t.v, mass -= double(t.u);
      }
      total.add({f, slopes, mass});
    });
    return total;
  }

  FiniteSum sum_of_logits() const {
    FiniteSum total;
    for_tiles([&](int64_t, int n, const real* x, const real*) { total.add(finite_sum(x, n)); });
    return total;
  }
  FiniteSum sum_of_all_logits() const {
    return source.over_segments(
        [&](int64_t begin, int64_t end) {
          FiniteSum total;
          Buffer<real> b;
          source.for_tiles(begin, end, [&](int64_t i, int n) {
            total.add(finite_sum(source.input(r).tile(i, n, b), n));
          });
          return total;
        },
        [](FiniteSum& total, const FiniteSum& part) { total.add(part); });
  }

  // Write the gradients of the values to a.dt, and those of the k logits to dx.
  template <class Class>
  void gradients(const Class& class_of, real g, real* dx) const {
    const RowWriter<real> out{row_of(a.dt), convert, convert.same};
    Buffer<real> b;
    for_tiles([&](int64_t i, int n, const real* x, const real* v) {
      const Class one = class_of;
      FD_SIMD()
      for (int j = 0; j < n; ++j) dx[i + j] = one.grad_x(x[j], v[j], g);
      if (!a.dt.data) return;
      real* dv = out.begin(i, b);
      FD_SIMD()
      for (int j = 0; j < n; ++j) dv[j] = one.grad_value(x[j], v[j], g);
      out.end(i, n, dv);
    });
  }
  void no_gradients() const {
    if (!a.dt.data) return;
    char* const dt = static_cast<char*>(row_of(a.dt));
    for (int64_t i = 0; i < a.k * size_of(a.t_dtype); ++i) dt[i] = 0;
  }
  // Write the gradients of the k logits over those that all classes got.
  void put(const real* dx) const {
    source.convert.scatter(source.row_of(a.dx, r), a.classes, indices, int(a.k), dx);
  }

 private:
  const RowSource<P>& source;
  const RowArgs& a;
  const int64_t r;
  const int64_t* const indices;
  const Converters<real> convert;  // of the values
  // The tile that was read last.  Mostly there is only one.
  mutable int64_t held = -1;
  mutable Buffer<real> x, values;
  mutable const real* v = nullptr;

  void* row_of(const Matrix& m) const {
    return static_cast<char*>(m.data) + r * m.stride * size_of(a.t_dtype);
  }

  // Call body(i, n, logits, values) for every tile of the k classes.
  template <class Body>
  void for_tiles(Body body) const {
    source.for_tiles(0, a.k, [&](int64_t i, int n) {
      if (held != i) {
        source.convert.gather(source.row_of(a.x, r), a.classes, indices + i, n, x.data);
        v = convert.load(row_of(a.t), i, n, values.data);
        held = i;
      }
      body(i, n, x.data, v);
    });
  }

  static FiniteSum finite_sum(const real* x, int n) {
    double sum = 0, count = 0;
    FD_SIMD(reduction(+ : sum, count))
    for (int j = 0; j < n; ++j) {
      const bool finite = !is_infinite(x[j]);
      sum += finite ? double(x[j]) : 0.0;
      count += finite ? 1.0 : 0.0;
    }
    return {sum, count};
  }
};

// Write the gradient: `dense` writes that of all classes, then the k get theirs.  Those are
// computed first, because the logits may be overwritten.
template <class P, class Dense>
void backward_topk(const RowSource<P>& source, int64_t r, Dense dense) {
  using real = typename P::real;
  const RowArgs& a = source.a;
  const TopKClasses<P> topk(source, r);
  const real g = source.row(r).upstream().value;
  if (g == real(0)) {
    topk.no_gradients();
    return dense();
  }
  Buffer<real> b;
  real* const dx = a.k <= kTile ? b.data : new real[a.k];
  with_topk_class(source.loss.target, source.row(r).record(), source.scale,
                  [&](const auto& one) { topk.gradients(one, g, dx); });
  if (a.dx.data) dense(), topk.put(dx);
  if (dx != b.data) delete[] dx;
}
