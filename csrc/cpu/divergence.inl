  // The divergence of two rows: what the first sweep's moments give where they are sound, else a
  // second sweep over the row, which is in the cache.  Part of class Rows.

  template <class L>
  Terms<real> sum_terms(const L& terms_of, int64_t r, const Row<real>& row) const {
    return over_segments<Terms<real>>(
        a,
        [&](int64_t begin, int64_t end) {
          Terms<real> total{};
          Buffer<real> bx, bt;
          const Row<real> row_copy = row;
          const L policy = terms_of;
          const real k = scale;
          for (int64_t i = begin; i < end; i += kTile) {
            const int n = int(end - i < kTile ? end - i : kTile);
            const real *x = input(r).tile(i, n, bx), *t = target(r).tile(i, n, bt);
            real f = 0, u = 0, v = 0;
            FD_SIMD(reduction(+ : f, u, v))
            for (int j = 0; j < n; ++j) {
              const Terms<real> term = policy.terms(make_pair<kTarget>(x[j], t[j], k, row_copy));
              f += term.f, u += term.u, v += term.v;
            }
            total.add({f, u, v});
          }
          return total;
        },
        [](Terms<real>& total, const Terms<real>& part) { total.add(part); });
  }

  // KL(p || q) of two rows of logits, and row.gap.  Where the rows are so close that the moments
  // cancel, with d = log q~ - log p~ and c = sum p d: KL = log(1 + sum p (e^(d-c) - 1 - (d - c))).
  real anchor(int64_t r, const RowState<P>& s, Row<real>& row) const {
    const real mean = s.sums.a / s.t.sum;
    row.gap = log_of(s.x.sum / s.t.sum);
    const Difference<real> kl = sum_of(mean, row.gap);
    if (kl.sound || kl.value != kl.value || is_infinite(kl.value)) return kl.value;
    Row<real> centred = row;
    centred.gap = -mean;
    centred.x_logz -= kl.value;
    const real excess =
        log1p(sum_terms(KlDiv<real, kTarget>(a.params), r, centred).f);
    row.gap = excess - mean;
    return excess;
  }

  real divergence(int64_t r, const RowState<P>& s, Row<real>& row) const {
    using Moment = typename P::Moment;
    constexpr bool kLogits = kTarget == Target::kLogits;
    const real kl = kLogits ? anchor(r, s, row) : s.sums.a + mass_times(row.mass, row.x_logz);
    // u and v follow from homogeneity: they add up to f~, and one of them is q - p or its negative.
    if (P::kMoment == Moment::kForward && !is_infinite(kl)) {
      row.a = kl != kl ? kl : real(1) - row.mass;
      row.b = kl;
      return kl;
    }
    if (P::kMoment == Moment::kReverse) {
      const Difference<real> reverse =
          sum_of(s.sums.b / s.x.sum, -(kLogits ? log_of(s.x.sum / s.t.sum) : row.x_logz));
      if (reverse.sound || (!kLogits && !is_infinite(reverse.value))) {
        row.a = reverse.value;
        row.b = row.mass - real(1);
        return reverse.value;
      }
    }
    const Terms<real> sum = sum_terms(loss, r, row);
    row.a = sum.u, row.b = sum.v;
    return sum.f - real(P::kShift) * (real(1) - row.mass);
  }

  void divergence_grad_x(const real* x, const real* t, real* dx, int n, const Row<real> row,
                         real g) const {
    const P policy = loss;
    const real k = scale;
    FD_SIMD()
    for (int j = 0; j < n; ++j) {
      const Pair<real> c = make_pair<kTarget>(x[j], t[j], k, row);
      dx[j] = g * (policy.terms(c).u - c.q() * row.a);
    }
  }

  void divergence_grad_t(const real* x, const real* t, real* dt, int n, const Row<real> row,
                         real g) const {
    const P policy = loss;
    const real k = scale;
    FD_SIMD()
    for (int j = 0; j < n; ++j) {
      const Pair<real> c = make_pair<kTarget>(x[j], t[j], k, row);
      const real v = policy.terms(c).v;
      if constexpr (kTarget == Target::kLogits) dt[j] = g * k * (v - c.p() * row.b);
      if constexpr (kTarget == Target::kLogProbs) dt[j] = g * (v + real(P::kShift) * c.p());
      if constexpr (kTarget == Target::kProbs)
        dt[j] = t[j] == real(0) ? real(0) : g * (v / t[j] + real(P::kShift));
    }
  }
