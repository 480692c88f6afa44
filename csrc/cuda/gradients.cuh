// Writes the gradients of a row or of a piece of it.
#pragma once

#include "cuda/row_reader.cuh"
#include "cuda/slice.cuh"

namespace fastdiv {

// How many packs of each row a thread holds while it computes gradients.  Of two rows in 16 bits,
// one: that is 16 numbers.
template <class Reader>
constexpr int kGradientPacks = sizeof(typename Reader::Element) == 2 && Reader::kTeacher ? 1 : 2;

// Reads the packs from global memory.
template <class Reader>
class GlobalPacks {
  using T = typename Reader::Element;
  static constexpr int kPacks = kGradientPacks<Reader>;

 public:
  // The first packs of the threads begin at column `first`, further ones `step` columns apart.
  __device__ __forceinline__ GlobalPacks(const Reader& reader, int first, int step)
      : reader_(reader),
        x_{reader.x, reader.begin, reader.end},
        t_{reader.t, reader.begin, reader.end},
        step_(step) {
    const int span = (kPacks - 1) * step + Reader::kSize;
    whole_ = x_.whole_runs(first, span);
    if constexpr (Reader::kTeacher) {
      const unsigned of_t = t_.whole_runs(first, span);
      whole_ = of_t < whole_ ? of_t : whole_;
    }
  }

  __device__ __forceinline__ void load(int i, Pack<T> (&px)[kPacks], Pack<T> (&pt)[kPacks]) const {
    const bool whole = unsigned(i - reader_.begin) < whole_;  // one test for both rows
    load(x_, Reader::no_logit(), whole, i, px);
    if constexpr (Reader::kTeacher) load(t_, Reader::no_target(), whole, i, pt);
  }

 private:
  __device__ __forceinline__ void load(const Stretch<T>& from, T fill, bool whole, int i,
                                       Pack<T> (&packs)[kPacks]) const {
    FD_UNROLL
    for (int u = 0; u < kPacks; ++u)
      packs[u] = whole ? from.at(i + u * step_) : from.load(i + u * step_, fill);
  }

  const Reader& reader_;
  Stretch<T> x_, t_;
  const int step_;
  unsigned whole_;  // at how many places, from `begin` on, all packs are whole and aligned
};

// Reads the packs from a slice that stays in shared memory, if its packs are those that are
// written.  Otherwise they come from global memory again.
template <class Reader>
class SlicePacks {
  using T = typename Reader::Element;
  using RowSlice = Slice<T, Reader::kStreams>;
  static constexpr int kPacks = kGradientPacks<Reader>;

 public:
  __device__ __forceinline__ SlicePacks(const Reader& reader, const RowSlice& slice, int first,
                                        int step)
      : slice_(slice), global_(reader, first, step), step_(step), here_(slice.stays()) {
    FD_UNROLL
    for (int k = 0; k < Reader::kStreams; ++k)
      here_ = here_ && slice.rows[k].shift == reader.begin - first;
  }

  __device__ __forceinline__ void load(int i, Pack<T> (&px)[kPacks], Pack<T> (&pt)[kPacks]) const {
    if (!here_) return global_.load(i, px, pt);
    FD_UNROLL
    for (int u = 0; u < kPacks; ++u) {
      const int column = i + u * step_;
      px[u] = column < slice_.end ? slice_.pack_in_memory(0, column) : Pack<T>{};
      if constexpr (Reader::kTeacher)
        pt[u] = column < slice_.end ? slice_.pack_in_memory(1, column) : Pack<T>{};
    }
  }

 private:
  const RowSlice& slice_;
  const GlobalPacks<Reader> global_;
  const int step_;
  bool here_;
};

// Where the gradients of columns [begin, end) go.  Packs are aligned where they are written; one at
// an edge shares its 16 bytes with the neighbouring piece.
template <class Reader>
struct Gradients {
  using T = typename Reader::Element;
  using real = typename Reader::real;
  static constexpr int kSize = Reader::kSize, kPacks = kGradientPacks<Reader>;

  const Stretch<T> dx, dt;  // without a row: not asked for
  int first;                // the column at which the first pack begins
  bool dt_aligned;          // whether dt is aligned there, too

  __device__ __forceinline__ Gradients(const Reader& reader, int64_t r)
      : dx{reader.a.dx.data ? row_of<T>(reader.a.dx, r) : nullptr, reader.begin, reader.end},
        dt{Reader::kTeacher && reader.a.dt.data ? row_of<T>(reader.a.dt, r) : nullptr, reader.begin,
           reader.end} {
    const Stretch<T>& aligned = dx.row ? dx : dt;
    first = aligned.begin - aligned.misalignment(aligned.begin);
    dt_aligned = dt.row && dt.misalignment(first) == 0;
  }

  __device__ __forceinline__ void store(const Stretch<T>& to, bool aligned, int i, int step,
                                        const Pack<T> (&packs)[kPacks]) const {
    if (aligned && to.holds(i, (kPacks - 1) * step + kSize)) {
      FD_UNROLL
      for (int u = 0; u < kPacks; ++u) packs[u].write(to.row + i + u * step);
    } else {
      FD_UNROLL
      for (int u = 0; u < kPacks; ++u) to.store(i + u * step, packs[u]);
    }
  }
  __device__ __forceinline__ void store_dx(int i, int step, const Pack<T> (&p)[kPacks]) const {
    if (dx.row) store(dx, true, i, step, p);
  }
  __device__ __forceinline__ void store_dt(int i, int step, const Pack<T> (&p)[kPacks]) const {
    if (dt.row) store(dt, dt_aligned, i, step, p);
  }
};

// Compute and store the gradients of a thread's packs.  masked: columns that take no part get 0.
template <class PairOf, class Reader>
__device__ __forceinline__ void write_packs(
    const Reader& reader, const Gradients<Reader>& to, const typename Reader::Record& row,
    Outputs<typename Reader::real> g, int label, bool masked, int i, int step,
    const Pack<typename Reader::Element> (&px)[Gradients<Reader>::kPacks],
    const Pack<typename Reader::Element> (&pt)[Gradients<Reader>::kPacks]) {
  using P = typename Reader::Policy;
  using T = typename Reader::Element;
  using real = typename Reader::real;
  constexpr int kPacks = Gradients<Reader>::kPacks, kSize = Reader::kSize;
  const real scale = reader.scale;
  const auto tile = reader.unpack(px, pt, i, step);
  const auto t = [&](int c) { return Reader::kTeacher ? tile.t[c] : real(0); };
  const auto weight = [&](int c) { return P::kWeights ? tile.weights[c] : real(1); };
  const Outputs<real> gx{g.value * scale, g.entropy * scale};
  const auto grad_x = [&](int c) {
    return grad_of_input<PairOf, MathOf<T>>(reader.loss, tile.x[c], t(c), weight(c), row, gx,
                                            scale);
  };
  Pack<T> out[kPacks] = {};
  real d[tile.kColumns];
  // Stable pairs take most of the code, so both gradients are computed from one, wanted or not.
  constexpr bool kBoth = P::kDirectTerms && std::is_same_v<PairOf, StablePair<real>>;
  if constexpr (Reader::kTeacher)
    if (kBoth || to.dt.row) {
      tile.for_columns([&](int c, int u, int k) {
        out[u].set(k, narrowed<T>(grad_of_target<PairOf>(reader.loss, tile.x[c], tile.t[c],
                                                         weight(c), row, g.value, scale)));
        if (kBoth) d[c] = grad_x(c);
      });
      if (masked)
        reader.template each_masked<kPacks>(
            i, step, [&](int c) { out[c / kSize].set(c % kSize, narrowed<T>(real(0))); });
      to.store_dt(i, step, out);
    }
  if (!to.dx.row) return;
  if constexpr (!kBoth) tile.for_columns([&](int c, int, int) { d[c] = grad_x(c); });
  if constexpr (P::kReadsLabel) {
    FD_UNROLL
    for (int u = 0; u < kPacks; ++u) {
      const unsigned at = unsigned(label - (i + u * step));
      if (at >= unsigned(kSize)) continue;
      FD_UNROLL
      for (int k = 0; k < kSize; ++k)
        if (at == unsigned(k)) d[u * kSize + k] += reader.loss.grad_label(row, gx);
    }
  }
  if constexpr (Reader::kIsCapped)
    tile.for_columns([&](int c, int u, int k) { d[c] *= reader.cap.slope(widen(px[u].get(k))); });
  if (masked) reader.template each_masked<kPacks>(i, step, [&](int c) { d[c] = real(0); });
  tile.for_columns([&](int c, int u, int k) { out[u].set(k, narrowed<T>(d[c])); });
  to.store_dx(i, step, out);
}

// Write dL/dx and dL/dt.  kAhead: the next packs are loaded before these are used.
template <class PairOf, bool kAhead, class Packs, class Reader>
__device__ __forceinline__ void write_columns(const Reader& reader, const Packs& packs,
                                              const Gradients<Reader>& to,
                                              const typename Reader::Record& row,
                                              Outputs<typename Reader::real> g, int label,
                                              bool masked, const Threads& threads) {
  using T = typename Reader::Element;
  constexpr int kPacks = Gradients<Reader>::kPacks, kSize = Reader::kSize;
  const int step = threads.count * kSize, end = reader.end;
  int i = to.first + threads.index * kSize;
  if (i >= end) return;
  Pack<T> px[kPacks], pt[kPacks];
  if constexpr (kAhead) {
    // The first turn only loads, so that the code to load is there once.
    for (int next = i;; next += kPacks * step) {
      Pack<T> next_x[kPacks], next_t[kPacks];
      if (next < end) packs.load(next, next_x, next_t);
      if (next != i)
        write_packs<PairOf>(reader, to, row, g, label, masked, next - kPacks * step, step, px, pt);
      if (next >= end) return;
      FD_UNROLL
      for (int u = 0; u < kPacks; ++u) px[u] = next_x[u], pt[u] = next_t[u];
    }
  } else {
    for (; i < end; i += kPacks * step) {
      packs.load(i, px, pt);
      write_packs<PairOf>(reader, to, row, g, label, masked, i, step, px, pt);
    }
  }
}

// g is the upstream gradient of the row.
template <bool kAhead, class Packs, class Reader>
__device__ __forceinline__ void write_dense_gradients(const Reader& reader, const Packs& packs,
                                                      const Gradients<Reader>& to,
                                                      const RowIO<typename Reader::Policy>& self,
                                                      const typename Reader::Record& row,
                                                      Outputs<typename Reader::real> g,
                                                      const Threads& threads) {
  using P = typename Reader::Policy;
  using T = typename Reader::Element;
  using real = typename Reader::real;
  constexpr int kPacks = Gradients<Reader>::kPacks;
  if (g.value == real(0) && g.entropy == real(0)) {
    const Pack<T> zeros[kPacks] = {};
    const int step = threads.count * Reader::kSize;
    for (int i = to.first + threads.index * Reader::kSize; i < reader.end; i += kPacks * step) {
      to.store_dx(i, step, zeros);
      to.store_dt(i, step, zeros);
    }
    return;
  }
  const int64_t y = self.own.label;
  const bool labelled =
      P::kReadsLabel &&
      (!reader.mask || (self.own.has_class(reader.a) && reader.a.mask.has(reader.mask, y)));
  const int label = labelled ? int(y) : -1;
  const bool masked = reader.mask && masks_gradient<P>(row, g, Reader::kIsCapped);
  if constexpr (P::kDirectTerms)
    if (row.use_direct != real(0))
      return write_columns<DirectPair<real, MathOf<T>>, kAhead>(reader, packs, to, row, g, label,
                                                                masked, threads);
  write_columns<StablePair<real>, kAhead>(reader, packs, to, row, g, label, masked, threads);
}

}  // namespace fastdiv
