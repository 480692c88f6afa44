// Memory of exactly the right size, so that AddressSanitizer sees every access beside it.
#pragma once

#include <cmath>
#include <cstring>
#include <vector>

#include "common/dtype.h"
#include "losses/row_args.h"

namespace fastdiv {

// A matrix that ends with the last element of its last row.
struct RowBuffer {
  DType dtype;
  int64_t rows, classes, stride;
  std::vector<char> bytes;

  RowBuffer(DType d, int64_t r, int64_t c, int64_t padding)
      : dtype(d),
        rows(r),
        classes(c),
        stride(c + padding),
        bytes(((r - 1) * stride + c) * size_of(d)) {
    bytes.shrink_to_fit();
  }
  Matrix matrix() { return {bytes.data(), stride}; }
  void set(int64_t r, int64_t i, double v) {
    char* p = bytes.data() + (r * stride + i) * size_of(dtype);
    if (dtype == DType::kF64) *reinterpret_cast<double*>(p) = v;
    if (dtype == DType::kF32) *reinterpret_cast<float*>(p) = float(v);
    if (dtype == DType::kF16) narrow(float(v), reinterpret_cast<Half*>(p));
    if (dtype == DType::kBF16) narrow(float(v), reinterpret_cast<BFloat16*>(p));
  }
  double get(int64_t r, int64_t i) const {
    const char* p = bytes.data() + (r * stride + i) * size_of(dtype);
    if (dtype == DType::kF64) return *reinterpret_cast<const double*>(p);
    if (dtype == DType::kF32) return double(*reinterpret_cast<const float*>(p));
    return dtype == DType::kF16 ? double(widen(*reinterpret_cast<const Half*>(p)))
                                : double(widen(*reinterpret_cast<const BFloat16*>(p)));
  }
  std::vector<double> row(int64_t r) const {
    std::vector<double> v(classes);
    for (int64_t i = 0; i < classes; ++i) v[i] = get(r, i);
    return v;
  }
  // Compare the numbers; all NaNs are the same.
  bool same(const RowBuffer& o) const {
    if (bytes == o.bytes) return true;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < classes; ++i) {
        const double a = get(r, i), b = o.get(r, i);
        if (a != b && !(std::isnan(a) && std::isnan(b))) return false;
      }
    return true;
  }
};

// Numbers of the type that the kernels compute in.
struct Reals {
  bool f64;
  std::vector<char> bytes;

  Reals(bool d, int64_t n, double v) : f64(d), bytes(size_t(n * (d ? 8 : 4))) {
    for (int64_t i = 0; i < n; ++i) set(i, v);
  }
  void* data() { return bytes.data(); }
  void set(int64_t i, double v) {
    if (f64)
      reinterpret_cast<double*>(bytes.data())[i] = v;
    else
      reinterpret_cast<float*>(bytes.data())[i] = float(v);
  }
  double operator[](int64_t i) const {
    return f64 ? reinterpret_cast<const double*>(bytes.data())[i]
               : double(reinterpret_cast<const float*>(bytes.data())[i]);
  }
  // Compare the bits; all NaNs are the same, because the sign of one depends on the compiler.
  bool same(const Reals& o) const {
    const int64_t n = int64_t(bytes.size()) / (f64 ? 8 : 4), size = f64 ? 8 : 4;
    for (int64_t i = 0; i < n; ++i)
      if (std::memcmp(bytes.data() + i * size, o.bytes.data() + i * size, size_t(size)) != 0 &&
          !(std::isnan((*this)[i]) && std::isnan(o[i])))
        return false;
    return true;
  }
};

}  // namespace fastdiv
