// The named classes of a row (losses/named.h), divided among the threads of a team.
#pragma once

#include "cuda/gradients.cuh"
#include "cuda/tiles.cuh"
#include "losses/named.h"

namespace fastdiv {

struct MergeNamedSums {
  template <class Lanes>
  __device__ __forceinline__ void operator()(NamedSums& s, const Lanes& lanes) const {
    double sum[] = {s.mass, s.finite, s.count};
    lanes.template sum<3>(sum);
    s = {sum[0], sum[1], sum[2]};
  }
};
template <class real>
struct MergeLogSumExp {
  real scale;

  template <class Lanes>
  __device__ __forceinline__ void operator()(LogSumExp<real>& s, const Lanes& lanes) const {
    real max[] = {s.max};
    lanes.template max<1>(max);
    s.rebase(max[0], scale);
    lanes.template sum<1>(&s.sum);
  }
};

// Return the logit of a column, or NaN if it is out of range.
template <class Reader>
__device__ __forceinline__ typename Reader::real named_logit(const Reader& reader, int64_t column) {
  using real = typename Reader::real;
  return uint64_t(column) < uint64_t(reader.a.classes) ? reader.logit(column) : Limits<real>::nan;
}

// The sums and values of a forward.  Every thread of the team gets the same bits.
template <class Reader, class RowSlice>
struct NamedClasses {
  using real = typename Reader::real;
  const Reader& reader;
  const NamedRow<real>& names;
  RowSlice& slice;
  Team& team;

  __device__ __forceinline__ NamedSums named(const LogProbOf<real>& log_q) const {
    NamedSums total;
    for_own([&](int64_t j) {
      const int64_t column = names.column(j);
      if (!names.is_column(column)) return;
      const double x = double(reader.logit(column));
      total.mass += exp((x - log_q.max) * log_q.scale);
      total.add_logit(x);
    });
    return team.all(total, MergeNamedSums());
  }
  __device__ __forceinline__ NamedSums all() const {
    NamedSums total;
    each_tile([&](const auto& tile, int, int) {
      tile.for_columns([&](int c, int, int) { total.add_logit(double(tile.x[c])); });
    });
    return team.all(total, MergeNamedSums());
  }
  __device__ __forceinline__ LogSumExp<real> others() const {
    LogSumExp<real> total;
    const real scale = reader.scale;
    each_tile([&](auto tile, int i, int step) {
    // Few rows need this, so every name is compared with every column.
#pragma unroll 1
      for (int64_t j = 0; j < reader.a.k; ++j) {
        const int64_t column = names.column(j);
        tile.for_columns([&](int c, int u, int k) {
          if (column == i + u * step + k) tile.x[c] = -Limits<real>::infinity;
        });
      }
      total.rebase(max_of(tile.x, tile.kColumns, total.max), scale);
      tile.for_columns(
          [&](int c, int, int) { total.sum += exp_neg((tile.x[c] - total.max) * scale); });
    });
    return team.all(total, MergeLogSumExp<real>{scale});
  }

  __device__ __forceinline__ void write_values(const LogProbOf<real>& log_q, double rest) const {
    for_own([&](int64_t j) {
      const bool padding = names.is_padding(j);
      const real x = padding ? real(0) : named_logit(reader, names.column(j));
      names.set_value(j, padding ? 0 : log_q(double(x)));
    });
    if (team.leads() && names.size() > reader.a.k) names.set_value(reader.a.k, rest);
  }
  __device__ __forceinline__ void write_zeros() const {
    for_own([&](int64_t j) { names.set_value(j, 0); });
    if (team.leads() && names.size() > reader.a.k) names.set_value(reader.a.k, 0);
  }

 private:
  template <class Body>
  __device__ __forceinline__ void for_own(Body body) const {
    const int first = team.block * team.count + team.index;
    for (int64_t j = first; j < reader.a.k; j += team.count * team.blocks) body(j);
  }
  // Columns outside of the row are at -inf in every tile.
  template <class Body>
  __device__ __forceinline__ void each_tile(Body body) const {
    for_tiles<kTilePacks<typename Reader::Element>>(reader, slice, team, body);
  }
};

// Write the gradient of the reader's columns: `dense(g)` writes that of all, then those of the
// named classes among them are overwritten.
template <class Reader, class Dense>
__device__ __forceinline__ void write_named_gradients(const Reader& reader,
                                                      const NamedRow<typename Reader::real>& names,
                                                      bool counts,
                                                      const NamedRecord<typename Reader::real>& row,
                                                      const Threads& threads, Dense dense) {
  using real = typename Reader::real;
  const RowArgs& a = reader.a;
  const auto g = names.upstream();
  if (g.zero || !counts) return dense(Outputs<real>{0, 0});
  real* const overwritten =
      a.overwritten ? static_cast<real*>(a.overwritten) + names.r * a.k : nullptr;
  // Call body for the names of this thread whose classes are among the columns.
  const auto for_own = [&](auto body) {
    for (int64_t j = threads.index; j < a.k; j += threads.count) {
      const int64_t column = names.column(j);
      if (column >= reader.begin && column < reader.end) body(j, column);
    }
  };
  if (overwritten) {
    for_own([&](int64_t j, int64_t column) { overwritten[j] = reader.raw_logit(column); });
    threads.sync();
  }
  dense(dense_upstream(reader.loss, g, row));
  threads.sync();
  for_own([&](int64_t j, int64_t column) {
    if (reader.mask && !a.mask.has(reader.mask, column)) return;  // it keeps its 0
    if (!names.is_first(j)) return;                               // one thread writes it
    const real raw = overwritten ? overwritten[j] : reader.raw_logit(column);
    const real x = Reader::kIsCapped ? reader.cap.value(raw) : raw;
    real d = real(named_gradient(row, x, reader.scale, names.upstream_of_class(j), g.sum));
    d *= reader.scale;
    if constexpr (Reader::kIsCapped) d *= reader.cap.slope(raw);
    narrow(d, row_of<typename Reader::Element>(a.dx, names.r) + column);
  });
}

}  // namespace fastdiv
