// A pass over a slice: every thread takes its columns of each stage, tile by tile.
#pragma once

#include "cuda/row_reader.cuh"
#include "cuda/slice.cuh"

namespace fastdiv {

// How many packs of each row a thread takes at a time.  Terms that are stable near zero take so
// many instructions that one pack is enough.
template <class T>
constexpr int kTilePacks = sizeof(T) == 8 ? 1 : 2;
constexpr int kStablePacks = 1;

// Call body(tile, i, step) for a thread's tiles: their packs begin at columns i + u * step.
template <int kPacks, class Reader, class RowSlice, class Body>
__device__ __forceinline__ void for_tiles(const Reader& reader, RowSlice& slice,
                                          const Threads& threads, Body body) {
  using T = typename Reader::Element;
  constexpr int kSize = Reader::kSize, kStreams = Reader::kStreams;
  const int step = threads.count * kSize, stage = slice.stage();
  const Pack<T>* at[kStreams];  // the thread's next packs
  const auto find = [&] {
    FD_UNROLL
    for (int k = 0; k < kStreams; ++k) at[k] = pin_shared(slice.slot(k) + threads.index);
  };
  int first = slice.begin_pass();
  find();
  for (; first < slice.end; first += stage) {
    if (!slice.await(first)) continue;
    const int last = first + stage < slice.end ? first + stage : slice.end;
    for (int i = first + threads.index * kSize; i < last; i += kPacks * step) {
      Pack<T> packs[2][kPacks];
      FD_UNROLL
      for (int k = 0; k < kStreams; ++k) {
        slice.rows[k].load(at[k], threads.count, packs[k]);
        at[k] += kPacks * threads.count;
      }
      body(reader.unpack(packs[0], packs[1], i, step), i, step);
    }
    if (slice.next_slot()) {
      find();
    } else {  // a slot has one pack more than a stage
      FD_UNROLL
      for (int k = 0; k < kStreams; ++k) ++at[k];
    }
  }
  slice.end_pass();
}

}  // namespace fastdiv
