// Access to the rows of a call: data, weights, labels and column segments.  Part of rows.inl:
// compiled once per instruction set.

template <class P>
struct RowSource {
  using real = typename P::real;
  static constexpr Target kTarget = P::kTarget;
  static constexpr bool kTeacher = kTarget != Target::kNone;

  const RowArgs& a;
  const P loss;
  const Converters<real> convert;
  const Exponentials<real> kept;  // empty unless the loss keeps them

  // keep: a first pass over each row comes before its second, and may keep its exponentials.
  explicit RowSource(const RowArgs& args, bool keep = false)
      : a(args),
        loss(args.params),
        convert(converters(args.dtype, real())),
        kept(keep && keeps_exponentials<P>() && args.classes <= kMostKept
                 ? Exponentials<real>::of_thread(args.classes)
                 : Exponentials<real>()) {
    if (P::kWeights && !a.class_weight)
      for (int i = 0; i < kTile && i < a.classes; ++i) ones.data[i] = real(1);
  }

  real scale(int64_t r) const { return a.scale_of<real>(r); }

  RowReader<real> input(int64_t r) const {
    const real cap = real(P::kSoftcap ? a.softcap : 0);
    return {row_of(a.x, r), convert.load, {cap}, -Limits<real>::infinity, mask(r)};
  }
  RowReader<real> target(int64_t r) const {
    const real nothing = kTarget == Target::kProbs ? real(0) : -Limits<real>::infinity;
    return {row_of(a.t, r), convert.load, {real(0)}, nothing, mask(r)};
  }
  RowMask mask(int64_t r) const { return {a.mask.row(r), a.mask.bits}; }
  RowWriter<real> output(const Matrix& m, int64_t r, bool direct) const {
    return {row_of(m, r), convert, direct && convert.same};
  }
  const real* weights(int64_t i) const {
    return a.class_weight ? static_cast<const real*>(a.class_weight) + i : ones.data;
  }
  const real* whole_weights(int64_t i, int n, Buffer<real>& b) const {
    return fill_up(weights(i), n, real(0), b);
  }

  RowIO<P> row(int64_t r) const { return {a, r}; }

  // Return the logit of the label if the row reads it, else 0.
  real label_logit(int64_t r) const {
    Buffer<real> b;
    return row(r).reads_label() ? *input(r).tile(a.labels[r], 1, b) : real(0);
  }

  // Call body(i, n) for every tile of columns [begin, end).
  template <class Body>
  void for_tiles(int64_t begin, int64_t end, Body body, int tile = kTile) const {
    for (int64_t i = begin; i < end; i += tile) body(i, int(end - i < tile ? end - i : tile));
  }

  // Call body(s, begin, end) for every column segment, in order or on several threads.
  template <class Body>
  void for_segments(Body body) const {
    const auto segment = [&](int64_t s) {
      const int64_t begin = s * kSegment, end = begin + kSegment;
      body(s, begin, end < a.classes ? end : a.classes);
    };
    const int64_t count = segment_count(a.classes);
    if (a.split_columns == nullptr) {
      for (int64_t s = 0; s < count; ++s) segment(s);
    } else {
      a.split_columns(
          0, count, 1,
          [](int64_t begin, int64_t end, void* context) {
            for (int64_t s = begin; s < end; ++s) (*static_cast<decltype(&segment)>(context))(s);
          },
          const_cast<void*>(static_cast<const void*>(&segment)));
    }
  }

  // Merge what part(begin, end) returns for each segment, in order whichever thread computed it.
  template <class Part, class Merge>
  auto over_segments(Part part, Merge merge) const {
    using Result = decltype(part(int64_t(), int64_t()));
    static_assert(sizeof(Result) <= kScratchPerSegment, "scratch too small");
    Result total{};
    Result* parts = static_cast<Result*>(a.scratch);
    for_segments([&](int64_t s, int64_t begin, int64_t end) {
      const Result result = part(begin, end);
      if (a.split_columns)
        parts[s] = result;
      else if (s == 0)
        total = result;
      else
        merge(total, result);
    });
    if (a.split_columns) {
      total = parts[0];
      for (int64_t s = 1; s < segment_count(a.classes); ++s) merge(total, parts[s]);
    }
    return total;
  }

  void* row_of(const Matrix& m, int64_t r) const { return columns(m, r, 0); }
  // Return where a row goes on with column i, to read or to prefetch.
  char* columns(const Matrix& m, int64_t r, int64_t i) const {
    return static_cast<char*>(m.data) + (r * m.stride + i) * size_of(a.dtype);
  }

 private:
  Buffer<real> ones;
};
