// The named classes of a row (losses/named.h).  Part of rows.inl: compiled once per instruction
// set.

template <class P>
class NamedClasses {
  using real = typename P::real;

 public:
  NamedClasses(const RowSource<P>& source, int64_t r)
      : names{source.a, r}, source(source), a(source.a), r(r) {}

  const NamedRow<real> names;

  NamedSums named(const LogProbOf<real>& log_q) const {
    NamedSums sums;
    for_tiles([&](int64_t, int n, const int64_t* columns, const real* x) {
      for (int i = 0; i < n; ++i) {
        if (!names.is_column(columns[i])) continue;
        sums.mass += exp((double(x[i]) - log_q.max) * log_q.scale);
        sums.add_logit(x[i]);
      }
    });
    return sums;
  }
  // Return the sum and the number of all finite logits.
  NamedSums all() const {
    return source.over_segments(
        [&](int64_t begin, int64_t end) {
          NamedSums total;
          Buffer<real> b;
          source.for_tiles(begin, end, [&](int64_t i, int n) {
            const real* x = source.input(r).tile(i, n, b);
            double sum = 0, count = 0;
            FD_SIMD(reduction(+ : sum, count))
            for (int j = 0; j < n; ++j) {
              const bool finite = !is_infinite(x[j]);
              sum += finite ? double(x[j]) : 0.0;
              count += finite ? 1.0 : 0.0;
            }
            total.add({0, sum, count});
          });
          return total;
        },
        [](NamedSums& total, const NamedSums& part) { total.add(part); });
  }
  // Return the log-sum-exp of the classes without a name.
  LogSumExp<real> others() const {
    const real scale = source.scale(r);
    return source.over_segments(
        [&](int64_t begin, int64_t end) {
          LogSumExp<real> total;
          Buffer<real> b;
          source.for_tiles(begin, end, [&](int64_t i, int n) {
            const real* x = source.input(r).tile(i, n, b);
            if (x != b.data) store_same(b.data, 0, n, x);
            for (int64_t j = 0; j < a.k; ++j) {
              const int64_t at = names.column(j) - i;
              if (at >= 0 && at < n) b.data[at] = -Limits<real>::infinity;
            }
            total.rebase(max_of(b.data, n, total.max), scale);
            real sum = 0;
            const real max = total.max;
            FD_SIMD(reduction(+ : sum))
            for (int j = 0; j < n; ++j) sum += exp_neg((b.data[j] - max) * scale);
            total.sum += sum;
          });
          return total;
        },
        [&](LogSumExp<real>& total, LogSumExp<real> part) {
          const real max = larger_of(part.max, total.max);
          total.rebase(max, scale), part.rebase(max, scale);
          total.sum += part.sum;
        });
  }

  void write_values(const LogProbOf<real>& log_q, double rest) const {
    for_tiles([&](int64_t j, int n, const int64_t* columns, const real* x) {
      for (int i = 0; i < n; ++i)
        names.set_value(j + i, columns[i] == kNoClass ? 0 : log_q(double(x[i])));
    });
    if (names.size() > a.k) names.set_value(a.k, rest);
  }
  void write_zeros() const {
    for (int64_t j = 0; j < names.size(); ++j) names.set_value(j, 0);
  }

  // Compute the gradients of the named logits, where there is a rest, without the scale.
  void gradients(const NamedRecord<real>& row, double sum, double* out) const {
    const real scale = source.scale(r);
    for_tiles([&](int64_t j, int n, const int64_t*, const real* x) {
      for (int i = 0; i < n; ++i)
        out[j + i] = named_gradient(row, x[i], scale, names.upstream(j + i), sum);
    });
  }

 private:
  const RowSource<P>& source;
  const RowArgs& a;
  const int64_t r;

  // Call body(j, n, columns, logits) for every tile of the names; a logit out of range is NaN.
  template <class Body>
  void for_tiles(Body body) const {
    int64_t columns[kTile];
    Buffer<real> b;
    source.for_tiles(0, a.k, [&](int64_t j, int n) {
      for (int i = 0; i < n; ++i) columns[i] = names.column(j + i);
      source.convert.gather(source.row_of(a.x, r), a.classes, columns, n, b.data);
      const Softcap<real> cap{real(a.softcap)};
      if (cap.cap != real(0))
        for (int i = 0; i < n; ++i) b.data[i] = cap.value(b.data[i]);
      const RowMask mask = source.mask(r);
      if (mask.data)
        for (int i = 0; i < n; ++i)
          if (names.is_column(columns[i]) && !mask.has(columns[i]))
            b.data[i] = -Limits<real>::infinity;
      body(j, n, columns, b.data);
    });
  }
};

// The names of a row, in a list for each tile of its columns, and a number of each.
template <class real>
struct NamesOfTiles {
  int64_t *next, *first;
  double* numbers;

  NamesOfTiles(const NamedRow<real>& names, const RowMask& mask) {
    const int64_t tiles = (names.a.classes + kTile - 1) / kTile, k = names.a.k;
    next = static_cast<int64_t*>(thread_memory((tiles + 2 * k) * int64_t(sizeof(int64_t))));
    first = next + k, numbers = reinterpret_cast<double*>(first + tiles);
    for (int64_t tile = 0; tile < tiles; ++tile) first[tile] = -1;
    for (int64_t j = k; j-- > 0;) {
      const int64_t column = names.column(j);
      if (!names.is_column(column) || (mask.data && !mask.has(column))) continue;
      next[j] = first[column / kTile], first[column / kTile] = j;
    }
  }
  // Call body(j) for the names of the tile that column i is in.
  template <class Body>
  void each(int64_t i, Body body) const {
    for (int64_t j = first[i / kTile]; j >= 0; j = next[j]) body(j);
  }
};

template <class P>
void forward_named(const RowSource<P>& source, int64_t r) {
  const RowIO<P> row = source.row(r);
  const NamedClasses<P> named(source, r);
  row.record() = {};
  if (!named.names.counts(row.weight())) return named.write_zeros();
  const RowState<P> s = first_pass(source, r);
  finish_named(source.loss, named.names, s.x, source.scale(r), row.record(), named);
}

// Write the gradient.  `dense(g, zero, add)` writes that of all classes from its upstream gradient,
// and has `add` change every tile.
template <class P, class Dense>
void backward_named(const RowSource<P>& source, int64_t r, Dense dense) {
  using real = typename P::real;
  const RowIO<P> row = source.row(r);
  const NamedClasses<P> named(source, r);
  const NamedRow<real>& names = named.names;
  const auto g = names.upstream();
  if (g.zero || !names.counts(row.weight()))
    return dense(Outputs<real>{0, 0}, true, [](int64_t, int, real*, Outputs<real>) {});
  const NamesOfTiles<real> of_tiles(names, source.mask(r));
  if (P::kRest)  // before the logits may be overwritten
    named.gradients(row.record(), g.sum, of_tiles.numbers);
  else
    for (int64_t j = 0; j < source.a.k; ++j) of_tiles.numbers[j] = names.upstream(j);
  const real scale = source.scale(r);
  dense(dense_upstream(source.loss, g, row.record()), false,
        [&](int64_t i, int n, real* dx, Outputs<real>) {
          of_tiles.each(i, [&](int64_t j) {
            const int64_t at = names.column(j) - i;
            if (at < 0 || at >= n) return;  // the tile may be a part
            const real own = scale * real(of_tiles.numbers[j]);
            dx[at] = P::kRest ? own : dx[at] + own;
          });
        });
}
