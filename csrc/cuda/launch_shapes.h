// Launch shapes.  They depend on the loss, the GPU, the size of an element and the classes.
// They do not depend on the number of rows, so a row's result has the same bits in every batch.
#pragma once

#include "cuda/kernels.h"

namespace fastdiv {

constexpr int kWarp = 32, kMaxWarps = 32;

namespace cuda {

// How a forward divides a row.
struct ForwardShape {
  int threads;  // per block
  int rows;     // per block: more than one where each warp has a row
  int blocks;   // per cluster, which shares one row
  int slice;    // columns per block
  int cached;   // columns of the slice that stay in shared memory for a second pass
};

// How a backward divides a row: into pieces that do not depend on each other.
struct BackwardShape {
  int threads, rows;
  int piece;   // columns per block, or per warp where rows > 1
  int pieces;  // per row
};

// Who computes a row, by its size:
//   bytes     forward                                              backward
//   <= 2048   a warp                                               a warp
//   <= 8192   a block of 128 threads                               a block of 256 per 32 KiB
//   more      a block of 256; with clusters 2, 4 or 8 of them,     a block of 256 per 32 KiB
//             the fewest with at most 32 KiB each
// Blocks of 32 KiB let both rows of a pair and several blocks fit a multiprocessor.  kMinBlocks in
// rows.cuh bounds the registers, and reduce.cu has a shape of its own.
constexpr int64_t kBytesPerWarp = 2048, kBytesPerSmallBlock = 8192, kBytesPerBlock = 32768;
constexpr int kSmallBlockThreads = 128, kBlockThreads = 256;  // threads
constexpr int kWarpsPerSmallBlock = kSmallBlockThreads / kWarp;
constexpr int kMaxCluster = 8;  // blocks; every GPU with clusters allows so many
constexpr int kFirstWithClusters = 90;

// Shared memory that is kept free for the arrays in which a team exchanges results.
constexpr int64_t kStaticShared = 8704;

inline int round_up(int n, int step) { return (n + step - 1) / step * step; }

// `cached_rows`: how many rows to keep for a second pass, 0, 1 or 2, in `cache_bytes`.
// `columns`: how many a thread holds at a time.  Slices and caches are multiples of what a block
// holds.
inline ForwardShape forward_shape(const Gpu& gpu, int64_t element, int columns, int cached_rows,
                                  int64_t cache_bytes, int classes) {
  const int64_t bytes = classes * element;
  if (bytes <= kBytesPerWarp) return {kSmallBlockThreads, kWarpsPerSmallBlock, 1, classes, 0};
  ForwardShape shape{bytes <= kBytesPerSmallBlock ? kSmallBlockThreads : kBlockThreads, 1, 1,
                     classes, 0};
  if (gpu.architecture >= kFirstWithClusters)
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
  if (classes * element <= kBytesPerWarp)
    return {kSmallBlockThreads, kWarpsPerSmallBlock, classes, 1};
  const int pack = int(16 / element), piece = int(kBytesPerBlock / element);
  // The first pack may begin before the row, where the gradient is aligned.
  return {kBlockThreads, 1, piece, round_up(classes + pack - 1, piece) / piece};
}

}  // namespace cuda
}  // namespace fastdiv
