// Launch shapes.  They depend on the loss, the GPU, the size of an element and the classes.
// They do not depend on the number of rows, so a row's result has the same bits in every batch.
#pragma once

#include "cuda/kernels.h"

namespace fastdiv {

constexpr int kWarp = 32;

namespace cuda {

// Constants that variants of the kernels change, to compare them on a GPU.
#ifndef FD_BLOCK_BYTES
#define FD_BLOCK_BYTES 32768
#endif
#ifndef FD_BLOCK_THREADS
#define FD_BLOCK_THREADS 128
#endif
#ifndef FD_STAGE_BYTES
#define FD_STAGE_BYTES 8192
#endif

// Who computes a row, by its size:
//   bytes     forward                                           backward
//   <= 512    8 lanes                                           8 lanes
//   <= 1024   16 lanes                                          16 lanes
//   <= 2048   a warp                                            a warp
//   <= 8192   a warp                                            blocks of 256, one per 32 KiB
//   more      a block of 128; with clusters 2, 4 or 8 of them,  blocks of 256, one per 32 KiB
//             the fewest with at most 32 KiB each
// A forward's fixed cost per row and thread is that of about 30 columns.  So few threads share a
// row, and the copies that a block has asked for keep memory busy, not its threads.
constexpr int64_t kBytesPer8Lanes = 512, kBytesPer16Lanes = 1024;
constexpr int64_t kBytesPerForwardWarp = 8192, kBytesPerBackwardWarp = 2048;
constexpr int64_t kBytesPerBlock = FD_BLOCK_BYTES, kBytesPerPiece = 32768;
constexpr int kForwardThreads = FD_BLOCK_THREADS, kBackwardThreads = 256;  // of every block
// Blocks; every GPU with clusters allows eight.  A lane takes the result of each warp of a cluster.
constexpr int kMaxCluster = kForwardThreads > 128 ? kWarp * kWarp / kForwardThreads : 8;
constexpr int kFirstWithClusters = 90;
FD_FN int max_cluster_of(int architecture) {
  return architecture < kFirstWithClusters ? 1 : kMaxCluster;
}

// A block's part of a row comes in stages, for which it has a ring of slots in shared memory.  If
// there is a slot for every stage, the part stays there for later passes.
constexpr int64_t kBytesPerStage = FD_STAGE_BYTES;
constexpr int kSlots = int(kBytesPerBlock / kBytesPerStage), kMaxSlots = 8;
static_assert(kSlots >= 2 && kSlots <= kMaxSlots, "between two and eight stages for a block");

// How a forward divides a row.
struct ForwardShape {
  int team;    // threads of a block that share a row: 8, 16, 32 or all
  int blocks;  // per cluster, which shares one row
  int slice;   // columns per team
  int stage;   // columns of the slice that arrive together
  int slots;   // stages that have room

  FD_FN int rows() const { return kForwardThreads / team; }  // per block
  FD_FN bool stays() const { return slice <= stage * slots; }
  // Return the packs of 16 bytes that a stage of one row takes, which may begin off alignment.
  FD_FN int packs(int pack) const { return stage / pack + 1; }
  // Return the bytes of a block, where `streams` rows lie side by side.
  FD_FN int64_t shared(int pack, int streams) const {
    return int64_t(16) * packs(pack) * slots * streams * rows();
  }
};

// How a backward divides a row: into pieces that do not depend on each other.
struct BackwardShape {
  int team;    // threads that share a piece: 8, 16, 32 or all of a block
  int piece;   // columns
  int pieces;  // per row

  FD_FN int rows() const { return kBackwardThreads / team; }  // per block
};

// Shared memory that is kept free for the arrays in which a team exchanges results.
constexpr int64_t kStaticShared = 9216;

FD_FN int round_up(int n, int step) { return (n + step - 1) / step * step; }

// Return how many lanes share a short row, or 0 if the row is longer.
FD_FN int lanes_of(int64_t bytes, int64_t bytes_per_warp) {
  if (bytes <= kBytesPer8Lanes) return 8;
  if (bytes <= kBytesPer16Lanes) return 16;
  return bytes <= bytes_per_warp ? kWarp : 0;
}

// `columns`: how many a thread holds at a time; slices are multiples of what a team holds.
// `later_pass`: whether the row is certainly read again, so that it had better stay.
// `streams`: rows side by side, 1 or 2.
FD_FN ForwardShape forward_shape(const Gpu& gpu, int64_t element, int columns, int streams,
                                 bool later_pass, int classes) {
  const int64_t bytes = classes * element;
  if (const int lanes = lanes_of(bytes, kBytesPerForwardWarp)) {
    const int slice = round_up(classes, lanes * columns);
    return {lanes, 1, slice, slice, 1};
  }
  ForwardShape shape{kForwardThreads, 1, 0, int(kBytesPerStage / element), kSlots};
  while (shape.blocks < gpu.max_cluster && bytes > shape.blocks * kBytesPerBlock) shape.blocks *= 2;
  shape.slice = round_up(classes, shape.blocks * shape.team * columns) / shape.blocks;
  // A longer part stays if two blocks still share a multiprocessor.
  const int64_t room = (gpu.shared_memory - kStaticShared) / 2 / streams / (kBytesPerStage + 16);
  const int64_t most = room < kMaxSlots ? room : kMaxSlots;
  const int stages = (shape.slice + shape.stage - 1) / shape.stage;
  const bool bulk = gpu.architecture >= kFirstWithClusters;
  if (bulk && later_pass && stages > kSlots && stages <= most) shape.slots = stages;
  return shape;
}

FD_FN BackwardShape backward_shape(int64_t element, int classes) {
  if (const int lanes = lanes_of(classes * element, kBytesPerBackwardWarp))
    return {lanes, classes, 1};
  const int pack = int(16 / element), piece = int(kBytesPerPiece / element);
  // The first pack may begin before the row, where the gradient is aligned.
  return {kBackwardThreads, piece, round_up(classes + pack - 1, piece) / piece};
}

}  // namespace cuda
}  // namespace fastdiv
