// Which classes of a pack take part.
#pragma once

#include "cuda/device.cuh"
#include "losses/row_args.h"

namespace fastdiv {

// Return a bit for each of the n columns from i on, which is set if the column takes part.  Nothing
// outside of [begin, end) is read; these columns get no bit.
template <int n>
__device__ __forceinline__ unsigned taking_part(const ClassMask& mask, const uint8_t* row, int i,
                                                int begin, int end) {
  const bool whole = i >= begin && i + n <= end;
  if (!whole) {
    unsigned which = 0;
#pragma unroll 1
    for (int k = 0; k < n; ++k)
      if (i + k >= begin && i + k < end) which |= unsigned(mask.has(row, i + k)) << k;
    return which;
  }
  if (mask.bits) {
    const int first = i / 8, last = (i + n - 1) / 8;
    return (row[first] | unsigned(row[last]) << 8) >> (i % 8);
  }
  unsigned which = 0;
  FD_UNROLL
  for (int k = 0; k < n; ++k) which |= unsigned(row[i + k] != 0) << k;
  return which;
}

}  // namespace fastdiv
