// Blocks of a cluster that send each other words, and what may go wrong then.
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "selftest.h"

namespace {

constexpr unsigned kBlocks = 3, kThreads = 40, kRounds = 5;

struct alignas(16) Words {
  uint32_t v[4];
};

// In every round each block sends a number to all, and goes on with the sum of those it gets.  Two
// slots and barriers alternate.
__global__ void exchange(uint32_t* out) {
  FD_SHARED(Words, inbox, 2 * kBlocks);
  FD_SHARED(ArrivalBarrier, full, 2);
  const unsigned rank = cluster_rank();
  if (threadIdx.x == 0) {
    barrier_init(full, 1);
    barrier_init(full + 1, 1);
    if (!fault("missing-init-fence-of-peer")) barrier_init_fence();
  }
  cluster_arrive();
  if (fault("second-cluster-arrive")) cluster_arrive();
  uint32_t sum = blockIdx.x + 1;  // work that needs no other block
  if (!fault("missing-cluster-wait")) cluster_wait();
  for (unsigned round = 0; round < kRounds; ++round) {
    const unsigned slot = round % 2;
    if (threadIdx.x == 0) barrier_expect(full + slot, kBlocks * sizeof(Words));
    if (!fault("early-send")) __syncthreads();  // all have read what the last round brought
    if (threadIdx.x < kBlocks) {
      const uint32_t words[4] = {sum, rank, round, sum};
      send(inbox[slot * kBlocks + rank].v, threadIdx.x, words, full + slot);
    }
    if (fault("early-leaver") && rank == kBlocks - 1 && round == kRounds - 1) return;
    if (!fault("unawaited-words") || threadIdx.x == 0) barrier_wait(full + slot, round / 2 % 2);
    sum = 0;
    for (unsigned from = 0; from < kBlocks; ++from) {
      const Words& words = inbox[slot * kBlocks + from];
      sum = 3 * sum + words.v[0] + words.v[1] + words.v[2] + words.v[3];
    }
  }
  if (fault("missing-cluster-wait")) cluster_wait();
  if (fault("exit-within-cluster-barrier")) cluster_arrive();
  out[blockIdx.x * kThreads + threadIdx.x] = sum;
}

void test_exchange() {
  if (fault("cluster-on-ampere")) setenv("FASTDIV_SHIM_ARCHITECTURE", "80", 1);
  constexpr unsigned clusters = 2;
  std::vector<uint32_t> out(clusters * kBlocks * kThreads);
  const unsigned cluster = fault("cluster-too-large") ? 16 : kBlocks;
  cuda_on_cpu::launch(clusters * cluster, kThreads, cluster, 0, [&] { exchange(out.data()); });
  for (unsigned i = 0; i < out.size(); ++i) {
    const unsigned first = i / kThreads / kBlocks * kBlocks;
    uint32_t sums[kBlocks];
    for (unsigned rank = 0; rank < kBlocks; ++rank) sums[rank] = first + rank + 1;
    for (unsigned round = 0; round < kRounds; ++round) {
      uint32_t sum = 0;
      for (unsigned from = 0; from < kBlocks; ++from) sum = 3 * sum + 2 * sums[from] + from + round;
      for (uint32_t& s : sums) s = sum;
    }
    expect("result of exchange", out[i], sums[0]);
  }
}

// A pair of blocks swaps two words; the barrier between arrive and wait orders no memory.
__global__ void swap_words(uint32_t* out) {
  FD_SHARED(uint32_t, got, 2);
  FD_SHARED(ArrivalBarrier, full, 1);
  FD_SHARED(uint32_t, own, kThreads);
  if (threadIdx.x == 0) {
    barrier_init(full, 1);
    barrier_init_fence();
    barrier_expect(full, 8);
  }
  own[threadIdx.x] = threadIdx.x;
  cluster_arrive();
  cluster_wait();
  if (fault("relaxed-read")) out[0] = *cluster_peer(own + threadIdx.x, cluster_rank() ^ 1);
  if (threadIdx.x == 5) {
    const uint32_t words[2] = {blockIdx.x, 7};
    send(got, cluster_rank() ^ 1, words, full);
  }
  barrier_wait(full, 0);
  out[blockIdx.x * kThreads + threadIdx.x] = 10 * got[0] + got[1];
  if (fault("relaxed-read")) cluster_sync();
}

void test_swap() {
  std::vector<uint32_t> out(4 * kThreads);
  cuda_on_cpu::launch(4, kThreads, 2, 0, [&] { swap_words(out.data()); });
  for (unsigned i = 0; i < out.size(); ++i) expect("swapped", out[i], 10 * (i / kThreads ^ 1) + 7);
}

// Every block reads the next one's memory; a relaxed barrier lets none exit before that.
__global__ void remote_reads(uint32_t* out) {
  FD_SHARED(uint32_t, own, kThreads);
  own[threadIdx.x] = blockIdx.x + threadIdx.x;
  cluster_sync();
  const uint32_t got = *cluster_peer(own + threadIdx.x, (cluster_rank() + 1) % kBlocks);
  if (!fault("missing-relaxed-leave")) cluster_arrive();
  out[blockIdx.x * kThreads + threadIdx.x] = got;
  if (!fault("missing-relaxed-leave")) cluster_wait();
}

void test_remote_reads() {
  std::vector<uint32_t> out(2 * kBlocks * kThreads);
  cuda_on_cpu::launch(2 * kBlocks, kThreads, kBlocks, 0, [&] { remote_reads(out.data()); });
  for (unsigned i = 0; i < out.size(); ++i) {
    const unsigned block = i / kThreads, first = block / kBlocks * kBlocks;
    expect("read of a peer", out[i], first + (block + 1) % kBlocks + i % kThreads);
  }
}

}  // namespace

void test_cluster_barriers() {
  test_remote_reads();
  test_exchange();
  test_swap();
}
