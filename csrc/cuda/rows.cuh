// The kernels over rows on a GPU, for any policy of csrc/losses.
#pragma once

#include "cuda/gradients.cuh"
#include "cuda/launch.cuh"
#include "cuda/named.cuh"
#include "losses/find_kernels.h"

namespace fastdiv {
namespace cuda {

// --- registers ----------------------------------------------------------------------------------

template <class P>
constexpr bool has_moment() {
  if constexpr (P::kDivergence) return P::kMoment != P::Moment::kNone;
  return true;
}

template <class P>
constexpr bool has_rest() {
  if constexpr (P::kNamed) return P::kRest;
  return false;
}

// How many blocks of a forward share the 65536 registers of a multiprocessor, at least:
//   blocks      3    4    6    per multiprocessor
//   registers  168  128   80   per thread
// More would not fit its shared memory: a block takes 32 KiB for every row of its slices.
template <class P, bool kCapped>
constexpr int kForwardBlocks = (P::kTarget != Target::kNone                             ? 3
                                : has_rest<P>()                                         ? 4
                                : sizeof(typename P::real) == 8 || kCapped || P::kStats ? 4
                                                                                        : 6) *
                               128 / kForwardThreads;

// The same of a backward, whose blocks have twice as many threads and no shared memory:
//   blocks      4    3    2    1
//   registers  64   80  128  255
// Two rows in single precision are twice as many packs as in half precision.
template <class P, class T, bool kCapped>
constexpr int kBackwardBlocks = sizeof(T) == 8                         ? 1
                                : kCapped || P::kTilted || P::kWeights ? 2
                                : !has_moment<P>()                     ? 2
                                : P::kDivergence && sizeof(T) == 4     ? 2
                                : P::kDivergence || P::kNamed          ? 3
                                                                       : 4;

// --- forward ------------------------------------------------------------------------------------

// How far a thread lets its maxima grow, in scaled logits, before its sums are rebased to them.
#ifndef FD_REBASE_SLACK
#define FD_REBASE_SLACK 8
#endif

// The first pass of one thread.  Rebasing takes longer than a tile, and a warp rebases if one lane
// has a new maximum.  So sums stay relative to an older maximum until the new one is much larger.
template <class P, class T>
struct ThreadState {
  using real = typename P::real;
  static constexpr bool kNormalise = RowState<P>::kNormalise;
  RowState<P> state;
  real x_max = Limits<real>::lowest, t_max = Limits<real>::lowest;  // of all that was pushed

  template <class Tile>
  __device__ __forceinline__ void push(const P& loss, const Tile& tile, real scale) {
    constexpr real kSlack = FD_REBASE_SLACK;
    x_max = max_of(tile.x, tile.kColumns, x_max);
    bool far = (x_max - state.x.max) * scale > kSlack;
    if constexpr (kNormalise) {
      t_max = max_of(tile.t, tile.kColumns, t_max);
      far = far || (t_max - state.t.max) * scale > kSlack;
    }
    if (far) rebase(loss, scale);
    real tilted[tile.kColumns];
    constexpr bool kApprox = !P::kTilted || sizeof(T) == 2;
    state.template add<kApprox>(loss, {tile.x, tile.t, tile.weights, tile.kColumns, tilted}, scale);
  }
  __device__ __forceinline__ void rebase(const P& loss, real scale) {
    state.rebase(loss, x_max, kNormalise ? t_max : state.t.max, scale);
  }
};

// The second pass: sum the terms of a divergence.
template <class PairOf, int kPacks, class Reader, class RowSlice, class L, class real>
__device__ __forceinline__ TermSums<real> sum_terms_of(const Reader& reader, RowSlice& slice,
                                                       const Threads& threads, const L& loss,
                                                       const PairRecord<real>& row) {
  TermSums<real> sum;
  for_tiles<kPacks>(reader, slice, threads, [&](const auto& tile, int, int) {
    tile.for_columns([&](int c, int, int) {
      const auto pair =
          PairOf::template of<Reader::kTarget>(tile.x[c], tile.t[c], reader.scale, row);
      const Terms<real> term = loss.terms(pair);
      sum.add({term.f, term.u, term.v, pair.q, pair.p});
    });
  });
  return sum;
}
template <class Reader, class RowSlice, class L, class Record>
__device__ __forceinline__ TermSums<typename Reader::real> sum_terms(const Reader& reader,
                                                                     RowSlice& slice, Team& team,
                                                                     const L& loss,
                                                                     const Record& row) {
  using real = typename Reader::real;
  using T = typename Reader::Element;
  TermSums<real> sum;
  bool direct = false;
  if constexpr (L::kDirectTerms && std::is_same_v<Record, typename L::Record>) {
    direct = row.use_direct != real(0);
    if (direct) {
      sum =
          sum_terms_of<DirectPair<real, MathOf<T>>, kTilePacks<T>>(reader, slice, team, loss, row);
      if (L::kTermsAddUp) sum.f = sum.u + sum.v;
    }
  }
  if (!direct) sum = sum_terms_of<StablePair<real>, kStablePacks>(reader, slice, team, loss, row);
  return team.all(sum, MergeTerms<real>());
}

// Ask for a team's slice of a row.
template <class Reader>
__device__ __forceinline__ Slice<typename Reader::Element, Reader::kStreams> slice_of(
    const Reader& reader, Team& team, const ForwardShape& shape, unsigned char* shared) {
  using T = typename Reader::Element;
  using P = typename Reader::Policy;
  StagedRow<T> rows[Reader::kStreams];
  rows[0] = {reader.x, nullptr, 0, Reader::no_logit()};
  if constexpr (Reader::kTeacher) rows[1] = {reader.t, nullptr, 0, Reader::no_target()};
  const int columns = kTilePacks<T> * Reader::kSize;
  return {team, shape, int(reader.a.classes), reader.begin, reader.end, columns, rows, shared};
}

template <class P, class T, bool kCapped, bool kGradient>
__global__ void __launch_bounds__(kForwardThreads, (kForwardBlocks<P, kCapped>))
    forward_rows(const __grid_constant__ RowArgs a, const __grid_constant__ ForwardShape shape) {
  using real = typename P::real;
  using Reader = RowReader<P, T, kCapped>;
  FD_DYNAMIC_SHARED(shared);
  Team team(shape.team, shape.blocks);
  const int64_t r = team.row();
  if (r >= a.rows) return;
  const RowIO<P> self(a, r);
  const int begin = team.block * shape.slice, end = begin + shape.slice;
  const Reader reader(a, r, begin, end < int(a.classes) ? end : int(a.classes));
  const NamedRow<real> names{a, r};
  const bool wanted =
      P::kNamed ? names.counts(self.weight()) : self.weight() != real(0) || P::kStats;
  auto slice = slice_of(reader, team, shape, shared);
  const NamedClasses<Reader, decltype(slice)> named{reader, names, slice, team};
  typename RowIO<P>::Result result{};

  if (wanted) {
    // The merge hands it to all threads, so it has been read before anything is written over it.
    const real x_label =
        team.leads() && self.reads_label() ? reader.logit(self.own.label) : real(0);
    ThreadState<P, T> thread;
    ArgMax<real> largest;
    for_tiles<kTilePacks<T>>(reader, slice, team, [&](const auto& tile, int i, int step) {
      thread.push(reader.loss, tile, reader.scale);
      if constexpr (P::kStats)
        tile.for_columns([&](int c, int u, int k) { largest.push(tile.x[c], i + u * step + k); });
    });
    thread.rebase(reader.loss, reader.scale);
    FirstPass<P> first_pass(thread.state, x_label);
    const MergeFirstPass<P> merge{reader.loss, reader.scale};
    if constexpr (kGradient || P::kDivergence || P::kNamed || P::kStats)
      first_pass = team.all(first_pass, merge);
    else if (!team.leader(first_pass, merge))
      return;
    const RowState<P> state = first_pass.state();
    const auto second_pass = [&](const auto& loss, const auto& row) {
      return sum_terms(reader, slice, team, loss, row);
    };
    if constexpr (P::kNamed)
      finish_named(reader.loss, names, state.x, reader.scale, result.row, named);
    else
      result = self.finish(reader.loss, state, first_pass.x_label(), reader.scale, second_pass);
    if constexpr (P::kStats) {
      largest = team.all(largest, MergeArgMax<real>());
      if (team.leads()) self.store_stats(result, state, reader.scale, largest.column);
    }
  }
  if constexpr (P::kNamed) {
    if (!wanted) named.write_zeros();
    if (team.leads()) self.record() = result.row;
  } else if (team.leads()) {
    self.store(result);
  }
  if constexpr (kGradient) {
    // All reads of the row by other threads came before the merge.
    const Gradients<Reader> to(reader, r);
    const SlicePacks<Reader> packs(reader, slice, to.first, team.count * Reader::kSize);
    write_dense_gradients<false>(reader, packs, to, self, result.row, self.upstream(), team);
  }
  team.leave();
}

// --- backward -----------------------------------------------------------------------------------

template <class P, class T, bool kCapped>
__global__ void __launch_bounds__(kBackwardThreads, (kBackwardBlocks<P, T, kCapped>))
    backward_rows(const __grid_constant__ RowArgs a, const __grid_constant__ BackwardShape shape) {
  using real = typename P::real;
  using Reader = RowReader<P, T, kCapped>;
  const Threads threads(shape.team);
  const bool whole = !threads.whole_block();  // each team has a row
  const int64_t r = whole ? int64_t(blockIdx.x) * shape.rows() + threads.group()
                          : int64_t(blockIdx.x / unsigned(shape.pieces));
  if (r >= a.rows) return;
  // Each piece begins where the gradient is aligned.
  const int classes = int(a.classes);
  const Stretch<T> out{row_of<T>(a.dx.data ? a.dx : a.dt, r), 0, classes};
  const int piece =
      whole ? 0 : int(blockIdx.x % unsigned(shape.pieces)) * shape.piece - out.misalignment(0);
  const Reader reader(a, r, piece > 0 ? piece : 0,
                      whole || piece + shape.piece > classes ? classes : piece + shape.piece);
  const Gradients<Reader> to(reader, r);
  const GlobalPacks<Reader> packs(reader, to.first, threads.count * Reader::kSize);
  const RowIO<P> self(a, r);
  const auto record = self.record();
  const auto dense = [&](Outputs<real> g) {
    write_dense_gradients<true>(reader, packs, to, self, record, g, threads);
  };
  if constexpr (P::kNamed) {
    const NamedRow<real> names{a, r};
    write_named_gradients(reader, names, names.counts(self.weight()), record, threads, dense);
  } else {
    dense(self.upstream());
  }
}

// --- terms --------------------------------------------------------------------------------------

// Sum the terms with a given record.  For a shard of a row it is the record of the whole row.
template <class P, class T>
__global__ void __launch_bounds__(kForwardThreads, (kForwardBlocks<P, false>))
    terms_rows(const __grid_constant__ RowArgs a, const __grid_constant__ ForwardShape shape) {
  using real = typename P::real;
  using Reader = RowReader<P, T, false>;
  FD_DYNAMIC_SHARED(shared);
  Team team(shape.team, shape.blocks);
  const int64_t r = team.row();
  if (r >= a.rows) return;
  const RowIO<P> self(a, r);
  const int begin = team.block * shape.slice, end = begin + shape.slice;
  const Reader reader(a, r, begin, end < int(a.classes) ? end : int(a.classes));
  const bool wanted = self.weight() != real(0);
  auto slice = slice_of(reader, team, shape, shared);
  TermSums<real> sum;
  if (wanted) sum = sum_terms(reader, slice, team, reader.loss, self.record());
  if (team.leads()) self.store_terms(sum);
  team.leave();
}

// --- launches ---------------------------------------------------------------------------------

// Bytes of static shared memory: two arrays for each type that Team::all merges in forward_rows,
// and the barriers.
template <class P>
constexpr int64_t static_bytes() {
  using real = typename P::real;
  const auto words = [](size_t bytes) { return int64_t(bytes + 7) / 8 * 8; };
  int64_t bytes = words(sizeof(FirstPass<P>));
  if (P::kStats) bytes += words(sizeof(ArgMax<real>));
  if (P::kDivergence) bytes += words(sizeof(TermSums<real>));
  if (P::kNamed) bytes += words(sizeof(NamedSums)) + words(sizeof(LogSumExp<real>));
  return 2 * kWarp * bytes + (2 + kMaxSlots) * int64_t(sizeof(ArrivalBarrier));
}

// Return the shape of a forward, and how it is launched.
template <class P, class T>
struct ForwardLaunch {
  static constexpr int kStreams = P::kTarget == Target::kNone ? 1 : 2, kSize = Pack<T>::kSize;
  const ForwardShape shape;
  const Grid grid;

  ForwardLaunch(const RowArgs& a, const Gpu& gpu, bool later_pass)
      : shape(forward_shape(gpu, sizeof(T), kTilePacks<T> * kSize, kStreams, later_pass,
                            int(a.classes))),
        grid{(a.rows + shape.rows() - 1) / shape.rows() * shape.blocks, kForwardThreads,
             shape.blocks, shape.shared(kSize, kStreams), gpu.shared_memory - kStaticShared} {
    static_assert(static_bytes<P>() <= kStaticShared, "kStaticShared is too small");
  }
};

template <class P, class T, bool kGradient>
Status launch_forward(const RowArgs& a, const Gpu& gpu, void* stream) {
  const bool mean = P::kNamed && rest_of(a.params.loss) == Rest::kMean;
  const bool reads_again = !has_moment<P>() || mean;
  const ForwardLaunch<P, T> l(a, gpu, kGradient || reads_again);
  if constexpr (P::kSoftcap)
    if (a.softcap != 0)
      return launch(forward_rows<P, T, true, kGradient>, l.grid, stream, a, l.shape);
  return launch(forward_rows<P, T, false, kGradient>, l.grid, stream, a, l.shape);
}

template <class P, class T>
Status launch_backward(const RowArgs& a, const Gpu&, void* stream) {
  const BackwardShape shape = backward_shape(sizeof(T), int(a.classes));
  const Grid grid{(a.rows + shape.rows() - 1) / shape.rows() * shape.pieces, kBackwardThreads, 1, 0,
                  0};
  if constexpr (P::kSoftcap)
    if (a.softcap != 0) return launch(backward_rows<P, T, true>, grid, stream, a, shape);
  return launch(backward_rows<P, T, false>, grid, stream, a, shape);
}

template <class P, class T>
Status launch_terms(const RowArgs& a, const Gpu& gpu, void* stream) {
  const ForwardLaunch<P, T> l(a, gpu, false);
  return launch(terms_rows<P, T>, l.grid, stream, a, l.shape);
}

template <class T>
struct Kernels {
  template <class P>
  static const RowKernels* of() {
    static const RowKernels kernels = make<P>();
    return &kernels;
  }

 private:
  template <class P>
  static RowKernels make() {
    RowKernels k{launch_forward<P, T, false>, nullptr, nullptr, nullptr, traits_of<P>()};
    if constexpr (!P::kStats) k.backward = launch_backward<P, T>;
    if constexpr (!P::kStats && !P::kNamed) k.forward_grad = launch_forward<P, T, true>;
    if constexpr (has_terms<P>()) k.terms = launch_terms<P, T>;
    return k;
  }
};

}  // namespace cuda
}  // namespace fastdiv
