// The first pass over a row: the maxima of a tile, then its sums while it is in the cache.  Part of
// rows.inl: compiled once per instruction set.

constexpr int kTermsOfFirstPass = 32;  // of a lane of sum_in_runs

// kKeep: keeps the exponentials for a second pass.
template <class P, bool kKeep>
class FirstPass {
  using real = typename P::real;
  using State = RowState<P>;
  static constexpr bool kTarget = P::kTarget != Target::kNone;

 public:
  FirstPass(const RowSource<P>& source, int64_t r) : source(source), r(r), scale(source.scale(r)) {}

  // Add columns [i, i + n).
  void push(int64_t i, int n) {
    const real* x = source.input(r).whole_tile(i, n, x_buffer);
    const real* t = kTarget ? source.target(r).whole_tile(i, n, t_buffer) : nullptr;
    const real* w = P::kWeights ? source.whole_weights(i, n, w_buffer) : nullptr;
    const int whole = whole_vectors(n);
    rebase(max_of_tile(x, whole, state.x.max),
           State::kNormalise ? max_of_tile(t, whole, state.t.max) : state.t.max);
    empty = false;
    add(i, whole, x, t, w);
    if constexpr (P::kTilted) add_tilted(whole, x, t);
  }

  State result() {
    const auto sum = [&](bool used, int i) { return used ? total.sum(i) : real(0); };
    state.x.sum = sum(true, kX), state.t.sum = sum(kTarget, kT);
    state.sums.add({sum(P::kSums > 0, kA), sum(P::kSums > 1, kB), sum(P::kSums > 2, kC),
                    sum(P::kSums > 2, kD)});
    return state;
  }

 private:
  enum { kX, kT, kA, kB, kC, kD, kCount };
  using Totals = LaneSums<real, kCount>;

  const RowSource<P>& source;
  const int64_t r;
  const real scale;
  State state;  // the maxima; their sums are in `total`
  Totals total;
  bool empty = true;
  Buffer<real> x_buffer, t_buffer, w_buffer, tilted;

  void rebase(real x_max, real t_max) {
    if (x_max == state.x.max && t_max == state.t.max) return;
    if (empty) {
      state.x.max = x_max, state.t.max = t_max;
      return;
    }
    const Shifts<real> shift = state.rebase(source.loss, x_max, t_max, scale);
    auto& lane = total.lane;
    for (int j = 0; j < kLanes; ++j) {
      Sums<real> sums{lane[kA][j], lane[kB][j], lane[kC][j], lane[kD][j]};
      source.loss.rebase(sums, {shift.x.ratio, shift.x.delta, lane[kX][j]},
                         {shift.t.ratio, shift.t.delta, lane[kT][j]});
      lane[kX][j] *= shift.x.ratio, lane[kT][j] *= shift.t.ratio;
      lane[kA][j] = sums.a, lane[kB][j] = sums.b, lane[kC][j] = sums.c, lane[kD][j] = sums.d;
    }
  }

  // Not inlined, because fewer of its constants would stay in registers.
  __attribute__((noinline)) void add(int64_t i, int n, const real* x, const real* t,
                                     const real* w) {
    // The compiler can keep copies in registers.
    const P loss = source.loss;
    const real x_max = state.x.max, t_max = state.target_max(), scale = this->scale;
    // While this tile is computed, the next one comes into the cache.
    const int64_t size = size_of(source.a.dtype);
    const char* const next_x = source.columns(source.a.x, r, i + kTile);
    const char* const next_t = kTarget ? source.columns(source.a.t, r, i + kTile) : next_x;
    const Exponentials<real> kept = kKeep ? source.kept.at(i) : source.kept;
    if (kKeep) kept.set_maxima(x_max, t_max);
    sum_in_runs<kTermsOfFirstPass>(n, total, [=](int at, Totals& run) FD_INLINE {
      __builtin_prefetch(next_x + at * size);
      if (kTarget) __builtin_prefetch(next_t + at * size);
      const real *xs = x + at, *ts = kTarget ? t + at : x, *ws = P::kWeights ? w + at : x;
      real *ex = kKeep ? kept.x + at : nullptr, *et = kKeep ? kept.t + at : nullptr;
      FD_SIMD()
      for (int j = 0; j < kLanes; ++j) {
        const Column<real> c = State::template column<true>(
            xs[j], kTarget ? ts[j] : real(0), P::kWeights ? ws[j] : real(1), x_max, t_max, scale);
        const Sums<real> s = loss.partial(c);
        if (kKeep) ex[j] = c.ex;
        if (kKeep && P::kTarget != Target::kProbs) et[j] = c.et;
        run.lane[kX][j] += c.ex;
        if (kTarget) run.lane[kT][j] += c.et;
        if (P::kSums > 0) run.lane[kA][j] += s.a;
        if (P::kSums > 1) run.lane[kB][j] += s.b;
        if (P::kSums > 2) run.lane[kC][j] += s.c, run.lane[kD][j] += s.d;
      }
    });
  }

  void add_tilted(int n, const real* x, const real* t) {
    const P loss = source.loss;
    const real x_max = state.x.max, t_max = state.target_max(), scale = this->scale;
    real* const logs = tilted.data;
    real infinite = 0;
    FD_SIMD(reduction(+ : infinite))
    for (int j = 0; j < n; ++j) {
      logs[j] = State::tilted_log(loss, x[j], t[j], x_max, t_max, scale);
      infinite += State::infinite_term(loss, x[j], t[j], x_max, t_max, scale);
    }
    state.sums.b += infinite;
    state.tilted.rebase(max_of_tile(logs, n, state.tilted.max), real(1));
    const real max = state.tilted.max;
    LaneSums<real, 1> sum;
    sum_in_runs<kTermsOfFirstPass>(n, sum, [=](int at, LaneSums<real, 1>& run) FD_INLINE {
      const real* vs = logs + at;
      FD_SIMD()
      for (int j = 0; j < kLanes; ++j) run.lane[0][j] += exp_neg(vs[j] - max);
    });
    state.tilted.sum += sum.sum(0);
  }
};

template <class P, bool kKeep>
RowState<P> first_pass_of(const RowSource<P>& source, int64_t r) {
  return source.over_segments(
      [&](int64_t begin, int64_t end) {
        FirstPass<P, kKeep> pass(source, r);
        source.for_tiles(begin, end, [&](int64_t i, int n) { pass.push(i, n); });
        return pass.result();
      },
      [&](RowState<P>& total, const RowState<P>& part) {
        total.merge(source.loss, part, source.scale(r));
      });
}
template <class P>
RowState<P> first_pass(const RowSource<P>& source, int64_t r) {
  if constexpr (keeps_exponentials<P>())
    if (source.kept.x) return first_pass_of<P, true>(source, r);
  return first_pass_of<P, false>(source, r);
}
