// The exponentials of a row, which the first pass keeps for a second one.  Part of rows.inl:
// compiled once per instruction set.

// Rows of more classes would leave the L2 cache.
constexpr int64_t kMostKept = 1 << 16;

// Return whether a loss reads q and p of well-separated rows a second time.
template <class P>
constexpr bool keeps_exponentials() {
  if constexpr (P::kDivergence) return P::kDirectTerms && P::kMoment == P::Moment::kNone;
  return false;
}

template <class real>
struct Exponentials {
  real *x = nullptr, *t = nullptr;  // of a tile's columns, minus the maxima when it was read
  real *x_max = nullptr, *t_max = nullptr;  // of the tile

  // Return those of a thread's memory.
  static Exponentials of_thread(int64_t classes) {
    const int64_t columns = (classes + kTile - 1) / kTile * kTile, tiles = columns / kTile;
    real* at = static_cast<real*>(thread_memory((2 * columns + 2 * tiles) * sizeof(real)));
    return {at, at + columns, at + 2 * columns, at + 2 * columns + tiles};
  }
  // Return those from column i on, where a tile begins.
  Exponentials at(int64_t i) const {
    const int64_t tile = i / kTile;
    return {x + i, t + i, x_max + tile, t_max + tile};
  }
  void set_maxima(real of_x, real of_t) const { *x_max = of_x, *t_max = of_t; }
};
