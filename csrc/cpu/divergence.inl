// The divergence of two rows: what the moments of the first sweep give where they are sound, else a
// second sweep over the row, which is in the cache.
// Part of rows.inl: compiled once per instruction set.

template <class P, class L, class real>
Terms<real> sum_terms(const RowSource<P>& source, const L& loss, int64_t r, const Row<real>& row) {
  return source.over_segments(
      [&](int64_t begin, int64_t end) {
        Terms<real> total{};
        Buffer<real> bx, bt;
        source.for_tiles(begin, end, [&](int64_t i, int n) {
          const real *x = source.input(r).tile(i, n, bx), *t = source.target(r).tile(i, n, bt);
          // Copies, which the compiler can keep in registers.
          const Row<real> k = row;
          const L policy = loss;
          const real scale = source.scale;
          real f = 0, u = 0, v = 0;
          FD_SIMD(reduction(+ : f, u, v))
          for (int j = 0; j < n; ++j) {
            const Terms<real> term = policy.terms(make_pair<P::kTarget>(x[j], t[j], scale, k));
            f += term.f, u += term.u, v += term.v;
          }
          total.add({f, u, v});
        });
        return total;
      },
      [](Terms<real>& total, const Terms<real>& part) { total.add(part); });
}

// KL(p || q) of two rows of logits, and row.gap.  Where the rows are so close that the moments
// cancel, with d = log q~ - log p~ and c = sum p d: KL = log(1 + sum p (e^(d-c) - 1 - (d - c))).
template <class P, class real>
real anchor(const RowSource<P>& source, int64_t r, const RowState<P>& s, Row<real>& row) {
  const real mean = s.sums.a / s.t.sum;  // -c
  row.gap = log_of(s.x.sum / s.t.sum);
  const Difference<real> kl = sum_of(mean, row.gap);
  if (kl.sound || kl.value != kl.value || is_infinite(kl.value)) return kl.value;
  Row<real> centred = row;
  centred.gap = -mean;
  centred.x_logz -= kl.value;
  const KlDiv<real, P::kTarget> forward_kl(source.a.params);
  const real excess = log1p(sum_terms(source, forward_kl, r, centred).f);
  row.gap = excess - mean;
  return excess;
}

// The value; row.a = sum u and row.b = sum v for the backward.
template <class P, class real>
real divergence(const RowSource<P>& source, int64_t r, const RowState<P>& s, Row<real>& row) {
  using Moment = typename P::Moment;
  constexpr bool kLogits = P::kTarget == Target::kLogits;
  const real kl = kLogits ? anchor(source, r, s, row) : s.sums.a + mass_times(row.mass, row.x_logz);
  // u + v = f~ and one of them is q - p or its negative, so the value gives both sums.
  if (P::kMoment == Moment::kForward && !is_infinite(kl)) {
    row.a = kl != kl ? kl : real(1) - row.mass;
    row.b = kl;
    return kl;
  }
  if (P::kMoment == Moment::kReverse) {
    const real logs = kLogits ? log_of(s.x.sum / s.t.sum) : row.x_logz;
    const Difference<real> reverse = sum_of(s.sums.b / s.x.sum, -logs);
    if (reverse.sound || (!kLogits && !is_infinite(reverse.value))) {
      row.a = reverse.value;
      row.b = row.mass - real(1);
      return reverse.value;
    }
  }
  const Terms<real> sum = sum_terms(source, source.loss, r, row);
  row.a = sum.u, row.b = sum.v;
  return sum.f - real(P::kShift) * (real(1) - row.mass);
}
