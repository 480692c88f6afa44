// The k classes of a row with a top-k teacher (topk.h), divided among the threads of a team.
#pragma once

#include "cuda/tiles.cuh"
#include "losses/topk.h"

namespace fastdiv {

template <class real>
struct MergeLargest {
  template <class Lanes>
  __device__ __forceinline__ void operator()(real& v, const Lanes& lanes) const {
    lanes.template max<1>(&v);
  }
};
template <class real>
struct MergeTopKSums {
  template <class Lanes>
  __device__ __forceinline__ void operator()(TopKSums<real>& s, const Lanes& lanes) const {
    real sum[] = {s.f, s.v};
    lanes.template sum<2>(sum);
    lanes.template sum<1>(&s.mass);
    s.f = sum[0], s.v = sum[1];
  }
};
struct MergeFinite {
  template <class Lanes>
  __device__ __forceinline__ void operator()(FiniteSum& s, const Lanes& lanes) const {
    double sum[] = {s.sum, s.count};
    lanes.template sum<2>(sum);
    s = {sum[0], sum[1]};
  }
};

// The indices, logits and values of a row that Reader reads.
template <class Reader>
struct TopKEntries {
  using real = typename Reader::real;
  const Reader& reader;
  const int64_t r;

  __device__ __forceinline__ int64_t index(int64_t j) const {
    const Matrix& m = reader.a.indices;
    return static_cast<const int64_t*>(m.data)[r * m.stride + j];
  }
  __device__ __forceinline__ bool is_class(int64_t y) const {
    return uint64_t(y) < uint64_t(reader.a.classes);
  }
  __device__ __forceinline__ real logit(int64_t j) const {
    const int64_t y = index(j);
    return is_class(y) ? reader.logit(y) : Limits<real>::nan;
  }

  __device__ __forceinline__ real value(int64_t j) const {
    const Matrix& m = reader.a.t;
    const int64_t i = r * m.stride + j;
    if constexpr (sizeof(real) == 4) {
      if (reader.a.t_dtype == DType::kF16) return widen(static_cast<const Half*>(m.data)[i]);
      if (reader.a.t_dtype == DType::kBF16) return widen(static_cast<const BFloat16*>(m.data)[i]);
    }
    return static_cast<const real*>(m.data)[i];
  }
  __device__ __forceinline__ void set_grad_value(int64_t j, real v) const {
    const Matrix& m = reader.a.dt;
    const int64_t i = r * m.stride + j;
    if constexpr (sizeof(real) == 4) {
      if (reader.a.t_dtype == DType::kF16) return narrow(v, static_cast<Half*>(m.data) + i);
      if (reader.a.t_dtype == DType::kBF16) return narrow(v, static_cast<BFloat16*>(m.data) + i);
    }
    static_cast<real*>(m.data)[i] = v;
  }
};

// The sums that the forward needs.  Every thread of the team gets the same bits.
template <class Reader, class RowSlice>
struct TopKClasses {
  using real = typename Reader::real;
  const TopKEntries<Reader> entries;
  RowSlice& slice;
  Team& team;

  __device__ __forceinline__ real largest_value() const {
    real most = Limits<real>::lowest;
    for_each([&](int64_t j) { most = larger_of(entries.value(j), most); });
    return team.all(most, MergeLargest<real>());
  }
  template <class Term>
  __device__ __forceinline__ TopKSums<real> sum(const Term& term) const {
    TopKSums<real> total;
    for_each([&](int64_t j) {
      const Terms<real> t = term(entries.logit(j), entries.value(j));
      total.add({t.f, t.v, -double(t.u)});
    });
    return team.all(total, MergeTopKSums<real>());
  }
  __device__ __forceinline__ FiniteSum sum_of_logits() const {
    FiniteSum total;
    for_each([&](int64_t j) { add_finite(total, entries.logit(j)); });
    return team.all(total, MergeFinite());
  }
  __device__ __forceinline__ FiniteSum sum_of_all_logits() const {
    FiniteSum total;
    for_tiles<kTilePacks<typename Reader::Element>>(
        entries.reader, slice, team, [&](const auto& tile, int, int) {
          tile.for_columns([&](int c, int, int) { add_finite(total, tile.x[c]); });
        });
    return team.all(total, MergeFinite());
  }

 private:
  template <class Body>
  __device__ __forceinline__ void for_each(Body body) const {
    const int first = team.block * team.count + team.index;
    for (int64_t j = first; j < entries.reader.a.k; j += team.count * team.blocks) body(j);
  }
  // A column outside of the row is at -inf, and so is not counted.
  static __device__ __forceinline__ void add_finite(FiniteSum& total, real x) {
    if (!is_infinite(x)) total.add({double(x), 1});
  }
};

// Write the gradient of the reader's columns: `dense` writes that of all, then those of the k
// classes among them are overwritten.
template <class Reader, class Dense>
__device__ __forceinline__ void write_topk_gradients(const Reader& reader,
                                                     const RowIO<typename Reader::Policy>& self,
                                                     const TopKRecord<typename Reader::real>& row,
                                                     const Threads& threads, Dense dense) {
  using real = typename Reader::real;
  const RowArgs& a = reader.a;
  const int64_t r = self.r;
  const real g = self.upstream().value;
  const TopKEntries<Reader> entries{reader, r};
  real* const overwritten = a.overwritten ? static_cast<real*>(a.overwritten) + r * a.k : nullptr;
  // Call body for the entries of this thread.  An index out of range belongs to column 0.
  const auto for_own = [&](auto body) {
    for (int64_t j = threads.index; j < a.k; j += threads.count) {
      const int64_t y = entries.index(j), column = entries.is_class(y) ? y : 0;
      if (column >= reader.begin && column < reader.end) body(j, y);
    }
  };
  if (overwritten) {
    for_own([&](int64_t j, int64_t) { overwritten[j] = entries.logit(j); });
    threads.sync();
  }
  if (a.dx.data) {
    dense();
    threads.sync();
  }
  with_topk_class(reader.loss.target, row, reader.scale, [&](const auto& one) {
    for_own([&](int64_t j, int64_t y) {
      const real x = overwritten ? overwritten[j] : entries.logit(j), v = entries.value(j);
      if (a.dt.data) entries.set_grad_value(j, g == real(0) ? real(0) : one.grad_value(x, v, g));
      if (a.dx.data && g != real(0) && entries.is_class(y))
        narrow(one.grad_x(x, v, g), row_of<typename Reader::Element>(a.dx, r) + y);
    });
  });
}

}  // namespace fastdiv
