// Sums over the columns of a row, apart for every kLanes-th column.  Part of rows.inl: compiled
// once per instruction set.

// Sums of kCount numbers.  Those of all lanes are a vector that stays in a register.
template <class real, int kCount>
struct LaneSums {
  real lane[kCount][kLanes] = {};

  void add(const LaneSums& o) {
    for (int i = 0; i < kCount; ++i)
      for (int j = 0; j < kLanes; ++j) lane[i][j] += o.lane[i][j];
  }
  real sum(int i) const {
    real four[4] = {};
    for (int k = 0; k < kLanes; k += 4)
      for (int j = 0; j < 4; ++j) four[j] += lane[i][k + j];
    return (four[0] + four[1]) + (four[2] + four[3]);
  }
};

// Call add(i, run) for every vector of n columns.  Rounding errors grow with the number of terms,
// so a lane of `run` sums kTerms columns, and `total` sums the runs.
template <int kTerms, class real, int kCount, class Add>
FD_FN void sum_in_runs(int n, LaneSums<real, kCount>& total, const Add& add) {
  for (int begin = 0; begin < n; begin += kTerms * kLanes) {
    LaneSums<real, kCount> run;
    const int end = n - begin < kTerms * kLanes ? n : begin + kTerms * kLanes;
    for (int i = begin; i < end; i += kLanes) add(i, run);
    total.add(run);
  }
}
