// Launch shapes: a table of the GPU, the size of an element and the number of classes, and never
// of the number of rows, so that a row's bits are the same in every batch.
#pragma once

#include "cuda/kernels.h"

namespace fastdiv {
namespace cuda {

// How a forward shares a row out.
struct ForwardShape {
  int threads;  // of a block
  int rows;     // of a block: several where a warp has one each
  int blocks;   // of a cluster, which shares one row
  int slice;    // columns of a block
  int cached;   // columns of the slice that stay in shared memory for a second pass
};

// How a backward shares it out: nothing is summed, so a piece knows nothing of the others.
struct BackwardShape {
  int threads, rows;
  int piece;   // columns of a block, or of a warp where rows > 1
  int pieces;  // of a row
};

// Rows up to this many bytes take a warp, a block of 128 threads, one of 256; longer ones, where
// there are clusters, a block for every 32 KiB, so that two rows and several blocks fit a
// multiprocessor.
constexpr int64_t kBytesPerWarp = 2048, kBytesPerSmallBlock = 8192, kBytesPerBlock = 32768;
constexpr int kMaxCluster = 8;           // the most that every GPU with clusters grants
constexpr int64_t kStaticShared = 8704;  // at least what the exchanges of a team take

inline int round_up(int n, int step) { return (n + step - 1) / step * step; }

// `cached_rows`: rows that are kept for a second pass, 0, 1 or 2, in `cache_bytes`.  `columns`:
// what a thread holds at a time; slices and caches are whole numbers of what a block holds.
inline ForwardShape forward_shape(const Gpu& gpu, int64_t element, int columns, int cached_rows,
                                  int64_t cache_bytes, int classes) {
  const int64_t bytes = classes * element;
  if (bytes <= kBytesPerWarp) return {128, 4, 1, classes, 0};
  ForwardShape shape{bytes <= kBytesPerSmallBlock ? 128 : 256, 1, 1, classes, 0};
  if (gpu.architecture >= 90)
    while (shape.blocks < kMaxCluster && bytes > shape.blocks * kBytesPerBlock) shape.blocks *= 2;
  const int tile = shape.threads * columns;
  shape.slice = round_up(classes, shape.blocks * tile) / shape.blocks;
  if (cached_rows > 0) {
    const int fit = int(cache_bytes / (cached_rows * element)) / tile * tile;
    shape.cached = shape.slice < fit ? shape.slice : fit;
  }
  return shape;
}

inline BackwardShape backward_shape(int64_t element, int classes) {
  if (classes * element <= kBytesPerWarp) return {128, 4, classes, 1};
  const int pack = int(16 / element), piece = int(32768 / element);
  // The first pack may begin before the row, where the gradient is aligned.
  return {256, 1, piece, round_up(classes + pack - 1, piece) / piece};
}

}  // namespace cuda
}  // namespace fastdiv
