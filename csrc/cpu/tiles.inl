// Reads and writes rows tile by tile, converted to the type that is computed in.  A tile fits the
// L1 cache.  Part of rows.inl: compiled once per instruction set.

constexpr int kTile = 2048;
constexpr int kLanes = FD_LANES;  // floats in a vector, at least eight
static_assert(kTile % kLanes == 0 && kLanes % 8 == 0, "tiles are whole vectors");

// Loops that sum go over whole vectors, because GCC makes scalar code for the remaining columns.
// After the last column of a row come some without mass, which add nothing.
inline int whole_vectors(int n) { return (n + kLanes - 1) & -kLanes; }

// Return the largest number of whole vectors, or m.  The lanes are independent because a loop over
// a single maximum waits for each comparison.  Each array is a vector that stays in a register.
template <class real>
real max_of_tile(const real* x, int n, real m) {
  real a[kLanes], b[kLanes], c[kLanes], d[kLanes];
  for (int j = 0; j < kLanes; ++j) a[j] = b[j] = c[j] = d[j] = m;
  const real* const end = x + n;
  for (; end - x >= 4 * kLanes; x += 4 * kLanes) {
    for (int j = 0; j < kLanes; ++j) a[j] = larger_of(x[j], a[j]);
    for (int j = 0; j < kLanes; ++j) b[j] = larger_of(x[kLanes + j], b[j]);
    for (int j = 0; j < kLanes; ++j) c[j] = larger_of(x[2 * kLanes + j], c[j]);
    for (int j = 0; j < kLanes; ++j) d[j] = larger_of(x[3 * kLanes + j], d[j]);
  }
  for (; x != end; x += kLanes)
    for (int j = 0; j < kLanes; ++j) a[j] = larger_of(x[j], a[j]);
  for (int j = 0; j < kLanes; ++j) a[j] = larger_of(larger_of(a[j], b[j]), larger_of(c[j], d[j]));
  real most = m;
  for (int j = 0; j < kLanes; ++j) most = larger_of(a[j], most);
  return most;
}

template <class real>
using LoadTile = const real* (*)(const void* row, int64_t i, int n, real* buffer);
template <class real>
using StoreTile = void (*)(void* row, int64_t i, int n, const real* tile);

template <class real>
const real* load_same(const void* row, int64_t i, int, real*) {
  return static_cast<const real*>(row) + i;
}
template <class T>
const float* load_widened(const void* row, int64_t i, int n, float* __restrict buffer) {
  const T* __restrict from = static_cast<const T*>(row) + i;
  FD_SIMD()
  for (int j = 0; j < n; ++j) buffer[j] = widen(from[j]);
  return buffer;
}
template <class T>
void store_narrowed(void* row, int64_t i, int n, const float* __restrict tile) {
  T* __restrict to = static_cast<T*>(row) + i;
  FD_SIMD()
  for (int j = 0; j < n; ++j) narrow(tile[j], to + j);
}
#if defined(FD_F16C)
// Each takes one instruction for eight halves; widen() takes fourteen and narrow() twenty.
template <>
inline const float* load_widened<Half>(const void* row, int64_t i, int n, float* __restrict to) {
  const Half* from = static_cast<const Half*>(row) + i;
  int j = 0;
  for (; j + 8 <= n; j += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + j));
    _mm256_storeu_ps(to + j, _mm256_cvtph_ps(halves));
  }
  for (; j < n; ++j) to[j] = _cvtsh_ss(from[j].bits);
  return to;
}
template <>
inline void store_narrowed<Half>(void* row, int64_t i, int n, const float* __restrict tile) {
  Half* to = static_cast<Half*>(row) + i;
  int j = 0;
  for (; j + 8 <= n; j += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(tile + j), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + j), halves);
  }
  for (; j < n; ++j) to[j].bits = _cvtss_sh(tile[j], _MM_FROUND_TO_NEAREST_INT);
}
#endif
#if defined(FD_AVX512_BF16)
// One instruction for sixteen numbers; narrow() takes nine.  It writes 0 for subnormal numbers.
__attribute__((target("avx512bf16,avx512f,avx512bw,avx512vl"))) inline void store_bfloat16(
    void* row, int64_t i, int n, const float* tile) {
  uint16_t* const to = static_cast<uint16_t*>(row) + i;
  for (int j = 0; j < n; j += 16) {
    const __mmask16 some = n - j < 16 ? __mmask16((1u << (n - j)) - 1) : __mmask16(0xffff);
    const __m256bh halves = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(some, tile + j));
    _mm256_mask_storeu_epi16(to + j, some, __builtin_bit_cast(__m256i, halves));
  }
}
#endif
// Return the fastest function that rounds to bfloat16 on this machine.
inline StoreTile<float> bfloat16_store() {
#if defined(FD_AVX512_BF16)
  if (__builtin_cpu_supports("avx512bf16")) return store_bfloat16;
#endif
  return store_narrowed<BFloat16>;
}
template <class real>
void store_same(void* row, int64_t i, int n, const real* __restrict tile) {
  real* __restrict to = static_cast<real*>(row) + i;
  FD_SIMD()
  for (int j = 0; j < n; ++j) to[j] = tile[j];
}

// Read or write some classes of a row.  An index out of range reads NaN and writes nothing.
template <class real>
using GatherTile = void (*)(const void* row, int64_t classes, const int64_t* indices, int n,
                            real* tile);
template <class real>
using ScatterTile = void (*)(void* row, int64_t classes, const int64_t* indices, int n,
                             const real* tile);

template <class T, class real>
void gather(const void* row, int64_t classes, const int64_t* indices, int n, real* tile) {
  const T* from = static_cast<const T*>(row);
  for (int j = 0; j < n; ++j)
    tile[j] =
        uint64_t(indices[j]) < uint64_t(classes) ? widen(from[indices[j]]) : Limits<real>::nan;
}
template <class T, class real>
void scatter(void* row, int64_t classes, const int64_t* indices, int n, const real* tile) {
  T* to = static_cast<T*>(row);
  for (int j = 0; j < n; ++j)
    if (uint64_t(indices[j]) < uint64_t(classes)) narrow(tile[j], to + indices[j]);
}

template <class real>
struct Converters {
  LoadTile<real> load;
  StoreTile<real> store;
  GatherTile<real> gather;
  ScatterTile<real> scatter;
  bool same;  // the tensor has the type that is computed in
};
template <class T>
Converters<float> converters_of_halves(StoreTile<float> store) {
  return {load_widened<T>, store, gather<T, float>, scatter<T, float>, false};
}
template <class real>
Converters<real> converters_of() {
  return {load_same<real>, store_same<real>, gather<real, real>, scatter<real, real>, true};
}
inline Converters<float> converters(DType dtype, float) {
  if (dtype == DType::kF16) return converters_of_halves<Half>(store_narrowed<Half>);
  if (dtype == DType::kBF16) return converters_of_halves<BFloat16>(bfloat16_store());
  return converters_of<float>();
}
inline Converters<double> converters(DType, double) { return converters_of<double>(); }

template <class real>
struct Buffer {
  alignas(64) real data[kTile];
};

// Return a tile of whole vectors: the tile itself, or a copy followed by columns of `nothing`.
template <class real>
const real* fill_up(const real* x, int n, real nothing, Buffer<real>& b) {
  const int whole = whole_vectors(n);
  if (whole == n) return x;
  if (x != b.data) store_same(b.data, 0, n, x);
  for (int j = n; j < whole; ++j) b.data[j] = nothing;
  return b.data;
}

// Write the numbers whose mask is set, and `nothing` elsewhere; return how many, whole vectors.
template <class real>
int select_by_bytes(const real* x, const uint8_t* mask, int n, real nothing, real* to) {
  FD_SIMD()
  for (int j = 0; j < n; ++j) {
    const real v = x[j];
    to[j] = mask[j] != 0 ? v : nothing;
  }
  return n;
}
template <class real>
int select_by_bits(const real* x, const uint8_t* mask, int n, real nothing, real* to) {
  int j = 0;
  for (; j + 8 <= n; j += 8) {
    const int byte = mask[j / 8];
    FD_SIMD()
    for (int l = 0; l < 8; ++l) {
      const real v = x[j + l];
      to[j + l] = byte & (1 << l) ? v : nothing;
    }
  }
  return j;
}
#if FD_LANES == 16
inline int select_by_bytes(const float* x, const uint8_t* mask, int n, float nothing, float* to) {
  int j = 0;
  for (; j + 16 <= n; j += 16) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(mask + j));
    const __mmask16 some = _mm_test_epi8_mask(bytes, bytes);
    _mm512_storeu_ps(to + j, _mm512_mask_loadu_ps(_mm512_set1_ps(nothing), some, x + j));
  }
  return j;
}
inline int select_by_bits(const float* x, const uint8_t* mask, int n, float nothing, float* to) {
  int j = 0;
  for (; j + 16 <= n; j += 16) {
    uint16_t some;
    memcpy(&some, mask + j / 8, 2);
    _mm512_storeu_ps(to + j, _mm512_mask_loadu_ps(_mm512_set1_ps(nothing), some, x + j));
  }
  return j;
}
#elif defined(FD_F16C)
inline int select_by_bytes(const float* x, const uint8_t* mask, int n, float nothing, float* to) {
  int j = 0;
  for (; j + 8 <= n; j += 8) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(mask + j));
    const __m256i none = _mm256_cmpeq_epi32(_mm256_cvtepu8_epi32(bytes), _mm256_setzero_si256());
    _mm256_storeu_ps(to + j, _mm256_blendv_ps(_mm256_loadu_ps(x + j), _mm256_set1_ps(nothing),
                                              _mm256_castsi256_ps(none)));
  }
  return j;
}
inline int select_by_bits(const float* x, const uint8_t* mask, int n, float nothing, float* to) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  int j = 0;
  for (; j + 8 <= n; j += 8) {
    const __m256i own = _mm256_and_si256(_mm256_set1_epi32(mask[j / 8]), bit);
    const __m256i some = _mm256_cmpeq_epi32(own, bit);
    _mm256_storeu_ps(to + j, _mm256_blendv_ps(_mm256_set1_ps(nothing), _mm256_loadu_ps(x + j),
                                              _mm256_castsi256_ps(some)));
  }
  return j;
}
#endif

// Which classes of a row take part; all, without data.
struct RowMask {
  const uint8_t* data;
  bool bits;

  bool has(int64_t i) const { return bits ? data[i / 8] >> (i % 8) & 1 : data[i] != 0; }
  // Write numbers [i, i + n) of a row, and `nothing` for classes that take no part.
  template <class real>
  void select(const real* x, int64_t i, int n, real nothing, real* to) const {
    int j = 0;
    if (!bits)
      j = select_by_bytes(x, data + i, n, nothing, to);
    else if (i % 8 == 0)
      j = select_by_bits(x, data + i / 8, n, nothing, to);
    for (; j < n; ++j) to[j] = has(i + j) ? x[j] : nothing;
  }
};

// Reads one row of a matrix in tiles, softcapped if there is a cap, then masked if there is a mask.
template <class real>
struct RowReader {
  const void* row;
  LoadTile<real> load;
  Softcap<real> softcap;
  real nothing;  // the value of a column without mass
  RowMask mask;

  const real* raw(int64_t i, int n, Buffer<real>& b) const { return load(row, i, n, b.data); }
  const real* tile(int64_t i, int n, Buffer<real>& b) const {
    const real* x = raw(i, n, b);
    if (softcap.cap != real(0)) {
      const Softcap<real> cap = softcap;
      FD_SIMD()
      for (int j = 0; j < n; ++j) b.data[j] = cap.value(x[j]);
      x = b.data;
    }
    if (!mask.data) return x;
    mask.select(x, i, n, nothing, b.data);
    return b.data;
  }
  const real* whole_tile(int64_t i, int n, Buffer<real>& b) const {
    return fill_up(tile(i, n, b), n, nothing, b);
  }
};

// Writes one row of a gradient in tiles, without a buffer if nothing has to be converted.
template <class real>
struct RowWriter {
  void* row;
  Converters<real> convert;
  bool direct;

  real* begin(int64_t i, Buffer<real>& b) const {
    return direct ? static_cast<real*>(row) + i : b.data;
  }
  void end(int64_t i, int n, const real* tile) const {
    if (!direct) convert.store(row, i, n, tile);
  }
};
