// The kernels over rows on a GPU, for any policy of csrc/losses.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/topk.cuh"
#include "cuda/row_reader.cuh"
#include "losses/find_kernels.h"

namespace fastdiv {
namespace cuda {

template <class T, class real>
__device__ __forceinline__ void set(Pack<T>& pack, int k, real v) {
  T narrowed;
  narrow(v, &narrowed);
  pack.set(k, narrowed);
}

// Write dL/dx and dL/dt of columns [begin, end) of a row.  Packs are aligned where they are
// written.  A pack at the edge shares its 16 bytes with the neighbouring stretch.
template <class P, class T, bool kCapped>
__device__ __forceinline__ void write_dense_gradients(const RowReader<P, T, kCapped>& reader,
                                                      int64_t r, typename P::Record row, int begin,
                                                      int end, int thread, int threads) {
  using real = typename P::real;
  using Reader = RowReader<P, T, kCapped>;
  constexpr int kSize = Reader::kSize, kPacks = Reader::kPacks;
  const RowArgs& a = reader.a;
  const real scale = reader.scale;
  const Outputs<real> g = RowIO<P>{a, r}.upstream();
  const bool zero = g.value == real(0) && g.entropy == real(0);
  const Outputs<real> gx{g.value * scale, g.entropy * scale};
  const bool need_x = a.dx.data, need_t = Reader::kTeacher && a.dt.data;
  const Stretch<T> dx{need_x ? Reader::row_of(a.dx, r) : nullptr, begin, end};
  const Stretch<T> dt{need_t ? Reader::row_of(a.dt, r) : nullptr, begin, end};
  const int label = P::kReadsLabel ? int(a.labels[r]) : -1;
  const Stretch<T> aligned{need_x ? dx.row : dt.row, begin, end};
  const int first = begin - aligned.misalignment(begin);
  const int step = threads * kSize;
  for (int i = first + thread * kSize; i < end; i += kPacks * step) {
    typename Reader::Packs px, pt, out{};
    const auto store = [&](const Stretch<T>& to) {
      FD_UNROLL
      for (int u = 0; u < kPacks; ++u) to.store(i + u * step, out[u]);
    };
    if (zero) {
      if (need_x) store(dx);
      if (need_t) store(dt);
      continue;
    }
    reader.load(i, step, px, pt);
    const auto tile = reader.unpack(px, pt, i, step);
    const auto t = [&](int c) { return Reader::kTeacher ? tile.t[c] : real(0); };
    const auto weight = [&](int c) { return P::kWeights ? tile.weights[c] : real(1); };
    if (need_t) {
      if constexpr (Reader::kTeacher)
        Reader::for_columns([&](int c, int u, int k) {
          set(out[u], k,
              grad_of_target<StablePair<real>>(reader.loss, tile.x[c], t(c), weight(c), row,
                                               g.value, scale));
        });
      store(dt);
    }
    if (need_x) {
      real d[kColumns<P>];
      Reader::for_columns([&](int c, int, int) {
        d[c] = grad_of_input<StablePair<real>>(reader.loss, tile.x[c], t(c), weight(c), row, gx,
                                               scale);
      });
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
      if constexpr (kCapped)
        Reader::for_columns(
            [&](int c, int u, int k) { d[c] *= reader.cap.slope(widen(px[u].get(k))); });
      Reader::for_columns([&](int c, int u, int k) { set(out[u], k, d[c]); });
      store(dx);
    }
  }
}

template <class P, class T, bool kCapped>
__device__ __forceinline__ void write_gradients(const RowReader<P, T, kCapped>& reader, int64_t r,
                                                const typename P::Record& row, int begin, int end,
                                                int thread, int threads) {
  const auto dense = [&] { write_dense_gradients(reader, r, row, begin, end, thread, threads); };
  if constexpr (P::kTopK)
    write_topk_gradients(reader, r, row, RowIO<P>{reader.a, r}.upstream().value, begin, end, thread,
                         threads, dense);
  else
    dense();
}

template <class P>
constexpr bool has_moment() {
  if constexpr (P::kDivergence) return P::kMoment != P::Moment::kNone;
  return true;
}
// How many blocks of 256 threads share the 65536 registers of a multiprocessor, at least:
//   blocks      4    3    2    1
//   registers  64   80  128  255   per thread
// Kernels that would spill get fewer blocks: fewer threads with more loads in flight each.
template <class P, bool kCapped, bool kGradient>
constexpr int kMinBlocks = sizeof(typename P::real) == 8        ? 1
                           : kCapped || P::kStats || P::kTilted ? 2
                           : P::kDivergence && kGradient        ? 2
                           : !has_moment<P>()                   ? 2
                           : P::kDivergence || P::kWeights      ? 3
                                                                : 4;

// The second pass: sum the terms of a divergence, from the cache where it has the row.
template <class Reader, class L, class real>
__device__ __forceinline__ TermSums<real> sum_terms(const Reader& reader, Team& team, const L& loss,
                                                    const PairRecord<real>& row) {
  TermSums<real> sum;
  reader.template pass<false>(team, [&](const auto& tile, int, int) {
    reader.for_columns([&](int c, int, int) {
      const auto pair =
          StablePair<real>::template of<Reader::kTarget>(tile.x[c], tile.t[c], reader.scale, row);
      const Terms<real> term = loss.terms(pair);
      sum.add({term.f, term.u, term.v, pair.q, pair.p});
    });
  });
  return team.all(sum, MergeTerms<real>());
}

template <class P, class T, bool kCapped, bool kGradient>
__global__ void __launch_bounds__(kBlockThreads, kMinBlocks<P, kCapped, kGradient>)
    forward_rows(const __grid_constant__ RowArgs a, const __grid_constant__ ForwardShape shape) {
  using real = typename P::real;
  FD_DYNAMIC_SHARED(cache);
  const int warp = int(threadIdx.x) / kWarp;
  const bool warps = shape.rows > 1;  // each has a row
  const int64_t r = warps ? int64_t(blockIdx.x) * shape.rows + warp : blockIdx.x / shape.blocks;
  if (r >= a.rows) return;
  Team team{warps ? kWarp : shape.threads, shape.blocks,
            warps ? int(threadIdx.x) % kWarp : int(threadIdx.x), int(blockIdx.x % shape.blocks)};
  const RowIO<P> self{a, r};
  const int classes = int(a.classes), begin = team.block * shape.slice;
  const int end = begin + shape.slice < classes ? begin + shape.slice : classes;
  const RowReader<P, T, kCapped> reader(a, r, begin, end, cache, shape.cached);
  typename RowIO<P>::Result result{};

  if (self.weight() != real(0) || P::kStats) {
    RowState<P> state;
    ArgMax<real> largest;
    reader.template pass<true>(team, [&](const auto& tile, int i, int step) {
      real tilted[kColumns<P>];
      state.push(reader.loss, {tile.x, tile.t, tile.weights, kColumns<P>, tilted}, reader.scale);
      if constexpr (P::kStats)
        reader.for_columns([&](int c, int u, int k) { largest.push(tile.x[c], i + u * step + k); });
    });
    // The row is in a cache now.  Nothing overwrites it before all threads have passed team.all.
    const real x_label = self.reads_label() ? reader.logit(a.labels[r]) : real(0);
    state = team.all(state, MergeStates<P>{reader.loss, reader.scale});
    const auto second_pass = [&](const auto& loss, const auto& row) {
      return sum_terms(reader, team, loss, row);
    };
    if constexpr (P::kTopK)
      result = self.finish(reader.loss, state, x_label, reader.scale,
                           TopKClasses<RowReader<P, T, kCapped>>{{reader, r}, team});
    else
      result = self.finish(reader.loss, state, x_label, reader.scale, second_pass);
    if constexpr (P::kStats) {
      largest = team.all(largest, MergeArgMax<real>());
      if (team.leads()) self.store_stats(result, state, reader.scale, largest.column);
    }
  }
  if (team.leads()) self.store(result);
  if constexpr (kGradient) {
    sync_threads(team.threads);
    write_gradients(reader, r, result.row, begin, end, team.thread, team.threads);
  }
  team.leave();
}

template <class P, class T, bool kCapped>
__global__ void __launch_bounds__(kBlockThreads, kMinBlocks<P, kCapped, false>)
    backward_rows(const __grid_constant__ RowArgs a, const __grid_constant__ BackwardShape shape) {
  const bool warps = shape.rows > 1;
  const int64_t r = warps ? int64_t(blockIdx.x) * shape.rows + int(threadIdx.x) / kWarp
                          : blockIdx.x / shape.pieces;
  if (r >= a.rows) return;
  // Each piece begins where the gradient is aligned.
  const int classes = int(a.classes);
  using Reader = RowReader<P, T, kCapped>;
  T* const gradient = a.dx.data ? Reader::row_of(a.dx, r) : Reader::row_of(a.dt, r);
  const Stretch<T> out{gradient, 0, classes};
  const int piece = warps ? 0 : int(blockIdx.x % shape.pieces) * shape.piece - out.misalignment(0);
  const int begin = piece > 0 ? piece : 0;
  const int end = warps || piece + shape.piece > classes ? classes : piece + shape.piece;
  const Reader reader(a, r, begin, end, nullptr, 0);
  write_gradients(reader, r, RowIO<P>{a, r}.record(), begin, end,
                  warps ? int(threadIdx.x) % kWarp : int(threadIdx.x),
                  warps ? kWarp : shape.threads);
}

// Sum the terms with a given record.  For a shard of a row it is the record of the whole row.
template <class P, class T>
__global__ void __launch_bounds__(kBlockThreads, kMinBlocks<P, false, false>)
    terms_rows(const __grid_constant__ RowArgs a, const __grid_constant__ ForwardShape shape) {
  using real = typename P::real;
  const int warp = int(threadIdx.x) / kWarp;
  const bool warps = shape.rows > 1;  // each has a row
  const int64_t r = warps ? int64_t(blockIdx.x) * shape.rows + warp : blockIdx.x / shape.blocks;
  if (r >= a.rows) return;
  Team team{warps ? kWarp : shape.threads, shape.blocks,
            warps ? int(threadIdx.x) % kWarp : int(threadIdx.x), int(blockIdx.x % shape.blocks)};
  const RowIO<P> self{a, r};
  const int classes = int(a.classes), begin = team.block * shape.slice;
  const int end = begin + shape.slice < classes ? begin + shape.slice : classes;
  const RowReader<P, T, false> reader(a, r, begin, end, nullptr, 0);
  TermSums<real> sum;
  if (self.weight() != real(0)) sum = sum_terms(reader, team, reader.loss, self.record());
  if (team.leads()) self.store_terms(sum);
  team.leave();
}

// --- launches ---------------------------------------------------------------------------------

// Bytes of shared memory in which a team exchanges what Team::all merges in forward_rows.
template <class P>
constexpr int64_t exchanged_bytes() {
  using real = typename P::real;
  int64_t bytes = sizeof(RowState<P>);
  if (P::kStats) bytes += sizeof(ArgMax<real>);
  if (P::kDivergence) bytes += sizeof(TermSums<real>);
  if (P::kTopK) bytes += sizeof(real) + sizeof(TopKSums<real>) + sizeof(FiniteSum);
  return 2 * (kMaxWarps + 1) * bytes;
}

template <class P, class T, bool kGradient>
Status launch_forward(const RowArgs& a, const Gpu& gpu, void* stream) {
  static_assert(exchanged_bytes<P>() <= kStaticShared, "kStaticShared is too small");
  constexpr int kRows = P::kTarget == Target::kNone ? 1 : 2;
  constexpr int kCachedRows = kGradient || P::kDivergence ? kRows : 0;
  // A second pass that is rare (only near zero) must not reduce the occupancy of the first.
  const int64_t max_shared = gpu.shared_memory - kStaticShared;
  const int64_t cache_bytes = kGradient || !has_moment<P>() ? max_shared : max_shared / 3;
  const ForwardShape shape =
      forward_shape(gpu, sizeof(T), kColumns<P>, kCachedRows, cache_bytes, int(a.classes));
  const Grid grid{(a.rows + shape.rows - 1) / shape.rows * shape.blocks, shape.threads,
                  shape.blocks, shape.cached * kCachedRows * int64_t(sizeof(T)), max_shared};
  if constexpr (P::kSoftcap)
    if (a.softcap != 0) return launch(forward_rows<P, T, true, kGradient>, grid, stream, a, shape);
  return launch(forward_rows<P, T, false, kGradient>, grid, stream, a, shape);
}

template <class P, class T>
Status launch_backward(const RowArgs& a, const Gpu&, void* stream) {
  const BackwardShape shape = backward_shape(sizeof(T), int(a.classes));
  const Grid grid{(a.rows + shape.rows - 1) / shape.rows * shape.pieces, shape.threads, 1, 0, 0};
  if constexpr (P::kSoftcap)
    if (a.softcap != 0) return launch(backward_rows<P, T, true>, grid, stream, a, shape);
  return launch(backward_rows<P, T, false>, grid, stream, a, shape);
}

template <class P, class T>
Status launch_terms(const RowArgs& a, const Gpu& gpu, void* stream) {
  const ForwardShape shape = forward_shape(gpu, sizeof(T), kColumns<P>, 0, 0, int(a.classes));
  const Grid grid{(a.rows + shape.rows - 1) / shape.rows * shape.blocks, shape.threads,
                  shape.blocks, 0, 0};
  return launch(terms_rows<P, T>, grid, stream, a, shape);
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
    if constexpr (!P::kStats) {
      k.backward = launch_backward<P, T>;
      k.forward_grad = launch_forward<P, T, true>;
    }
    if constexpr (has_terms<P>()) k.terms = launch_terms<P, T>;
    return k;
  }
};

}  // namespace cuda
}  // namespace fastdiv
