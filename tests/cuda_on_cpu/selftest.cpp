// Small kernels that check cuda_on_cpu, and faults that it or the sanitizers must report.  Built
// and run by test_cuda_on_cpu.py.  The argument is the fault to plant.
#include "selftest.h"

#include <cmath>
#include <vector>

namespace {

constexpr unsigned kAllLanes = ~0u;

template <class T>
__device__ T sum_of_warp(T v) {
  for (int m = 16; m > 0; m /= 2) v += __shfl_xor_sync(kAllLanes, v, m);
  return v;
}

// --- shuffles

template <class T>
__global__ void shuffles(T* out) {
  const T lane = T(threadIdx.x % 32);
  T* const mine = out + 3 * threadIdx.x;
  mine[0] = __shfl_xor_sync(kAllLanes, lane, 5);
  mine[1] = __shfl_sync(fault("foreign-mask") ? 0xffu : kAllLanes, lane, 7);
  mine[2] = __shfl_sync(kAllLanes, lane, int(threadIdx.x + 1));
}

template <class T>
void test_shuffles() {
  std::vector<T> out(3 * 64);
  cuda_on_cpu::launch(1, 64, 1, 0, [&] { shuffles(out.data()); });
  for (unsigned i = 0; i < 64; ++i) {
    expect("xor shuffle", double(out[3 * i]), i % 32 ^ 5);
    expect("broadcast", double(out[3 * i + 1]), 7);
    expect("rotation", double(out[3 * i + 2]), (i + 1) % 32);
  }
}

// Many blocks of one warp.
void test_warps() {
  std::vector<float> out(500);
  cuda_on_cpu::launch(unsigned(out.size()), 32, 1, 0, [&] {
    const float sum = sum_of_warp(float(blockIdx.x + threadIdx.x));
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
  });
  for (size_t i = 0; i < out.size(); ++i) expect("sum of warp", out[i], 32. * double(i) + 496);
}

// --- groups of lanes that share a warp, each with its own mask

constexpr unsigned kRow = 8;  // lanes of a group

// Each group sums the numbers of its lanes as often as its own number says.  Then its lanes pass
// the sum on through shared memory.
__global__ void sums_of_groups(int* out) {
  FD_SHARED(int, sums, 64);
  const unsigned group = threadIdx.x / kRow, first = group % 4 * kRow;
  unsigned mask = 0xffu << first;
  if (fault("overlapping-masks") && group == 1) mask |= 1u << (first - 1);
  if (group == 6) return;
  int sum = int(threadIdx.x);
  for (unsigned round = 0; round < (group + 3) % 8; ++round) {
    sum = int(threadIdx.x) + sum % 2;
    for (int m = kRow / 2; m > 0; m /= 2) sum += __shfl_xor_sync(mask, sum, m);
  }
  // Pairs of groups, of which one may have exited.
  const unsigned pair = 0xffffu << (first / 16 * 16);
  const int of_pair = __shfl_sync(pair, sum, int(threadIdx.x / kRow * kRow));
  sums[threadIdx.x] = of_pair;
  if (!fault("missing-syncwarp")) __syncwarp(mask);
  out[threadIdx.x] = sums[threadIdx.x ^ (kRow - 1)];
}

// Return what the lanes of a group compute.
int expected_sum(unsigned group) {
  int sums[kRow];
  for (unsigned i = 0; i < kRow; ++i) sums[i] = int(group * kRow + i);
  for (unsigned round = 0; round < (group + 3) % 8; ++round) {
    int total = 0;
    for (unsigned i = 0; i < kRow; ++i) total += int(group * kRow + i) + sums[i] % 2;
    for (int& sum : sums) sum = total;
  }
  return sums[0];
}

void test_lane_groups() {
  std::vector<int> out(3 * 64, -1);
  cuda_on_cpu::launch(3, 64, 1, 0, [&] { sums_of_groups(out.data() + blockIdx.x * 64); });
  for (unsigned i = 0; i < out.size(); ++i) {
    const unsigned group = i % 64 / kRow;
    expect("sum of group", out[i], group == 6 ? -1 : expected_sum(group));
  }
}

// --- barriers and shared memory

constexpr int kRounds = 3;

// Sum blockDim.x numbers, with the same slots in every round.
__global__ void block_sums(const float* in, float* out) {
  FD_SHARED(float, of_warp, 32);
  const unsigned warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int round = 0; round < kRounds; ++round) {
    const float sum = sum_of_warp(in[unsigned(round) * blockDim.x + threadIdx.x]);
    if (threadIdx.x % 32 == 0) of_warp[warp] = sum;
    if (!fault("missing-barrier")) __syncthreads();
    float total = 0;
    for (unsigned i = 0; i < warps; ++i) total += of_warp[i];
    if (!fault("missing-second-barrier")) __syncthreads();
    if (threadIdx.x == 0) out[blockIdx.x * kRounds + unsigned(round)] = total;
  }
  if (fault("static-overflow") && threadIdx.x == 0) of_warp[32] = 0;
  if (fault("global-overflow") && threadIdx.x == 5) out[0] = in[kRounds * blockDim.x];
}

void test_block_sums() {
  const unsigned blocks = 2, threads = 128;
  std::vector<float> in(kRounds * threads), out(kRounds * blocks);
  for (size_t i = 0; i < in.size(); ++i) in[i] = float(i % 7);
  cuda_on_cpu::launch(blocks, threads, 1, 0, [&] { block_sums(in.data(), out.data()); });
  for (size_t i = 0; i < out.size(); ++i) {
    float sum = 0;
    for (unsigned j = 0; j < threads; ++j) sum += in[i % kRounds * threads + j];
    expect("sum of block", out[i], sum);
  }
}

// Every thread passes a number to the opposite one through dynamic memory of exactly that size, and
// checks what this and the static memory held before.
__global__ void reversal(int* out, int* fresh) {
  FD_SHARED(double, scratch, 40);
  FD_DYNAMIC_SHARED(bytes);
  int* const numbers = reinterpret_cast<int*>(bytes);
  const unsigned opposite = blockDim.x - 1 - threadIdx.x, i = blockIdx.x * blockDim.x + threadIdx.x;
  fresh[i] = std::isnan(scratch[threadIdx.x]) && numbers[threadIdx.x] == -1;
  scratch[threadIdx.x] = 1;
  numbers[threadIdx.x + (fault("dynamic-overflow") ? 1 : 0)] = int(i);
  __syncthreads();
  out[i] = numbers[opposite];
}

void test_reversal() {
  const unsigned blocks = 3, threads = 40;  // the second warp is not whole
  std::vector<int> out(blocks * threads), fresh(blocks * threads);
  cuda_on_cpu::launch(blocks, threads, 1, threads * sizeof(int),
                      [&] { reversal(out.data(), fresh.data()); });
  for (unsigned i = 0; i < out.size(); ++i) {
    expect("opposite", out[i], i / threads * threads + threads - 1 - i % threads);
    expect("fresh memory is NaN", fresh[i], 1);
  }
}

// As much dynamic memory as a block has by default, and a static array.
void test_much_shared_memory() {
  const size_t dynamic_bytes = 48 << 10, most = 227 << 10;
  std::vector<float> out(32);
  if (fault("shared-above-allowed"))
    cuda_on_cpu::allow_dynamic_shared(dynamic_bytes - 1);
  else if (fault("shared-above-gpu"))
    cuda_on_cpu::allow_dynamic_shared(most - 64);
  else if (!fault("shared-not-allowed"))
    cuda_on_cpu::allow_dynamic_shared(most - 128);
  cuda_on_cpu::launch(1, 32, 1, dynamic_bytes, [&] {
    FD_SHARED(float, own, 32);
    FD_DYNAMIC_SHARED(bytes);
    float* const last = reinterpret_cast<float*>(bytes + dynamic_bytes) - 32;
    own[threadIdx.x] = last[threadIdx.x] = float(threadIdx.x);
    __syncwarp();
    out[threadIdx.x] = own[31 - threadIdx.x] + last[31 - threadIdx.x];
  });
  for (unsigned i = 0; i < out.size(); ++i) expect("in much memory", out[i], 62. - 2 * i);

  // The permission of an earlier launch does not count, and the default needs none.
  const size_t left = dynamic_bytes - sizeof(float) + (fault("shared-by-a-byte") ? 1 : 0);
  cuda_on_cpu::launch(1, 1, 1, left, [&] {
    FD_SHARED(float, own, 1);
    *own = 3;
    out[0] = *own;
  });
  expect("in all of the default memory", out[0], 3);
}

// Some threads exit; the others go on to barriers and shuffles.
__global__ void early_exit(int* out) {
  FD_SHARED(int, numbers, 96);
  if (threadIdx.x % 32 >= 8) return;
  const bool leaves = threadIdx.x >= 64;
  const int sum =
      int(threadIdx.x) + __shfl_xor_sync(fault("exited-lane") ? kAllLanes : 0xffu, int(threadIdx.x),
                                         fault("exited-lane") ? 8 : 1);
  if (leaves) return;
  numbers[threadIdx.x] = sum;
  __syncthreads();
  out[threadIdx.x] = numbers[threadIdx.x ^ 32];
}

void test_early_exit() {
  std::vector<int> out(96, -1);
  cuda_on_cpu::launch(1, 96, 1, 0, [&] { early_exit(out.data()); });
  for (unsigned i = 0; i < out.size(); ++i) {
    const bool lives = i < 64 && i % 32 < 8;
    expect("after others' exit", out[i], lives ? 2 * double((i ^ 32) & ~1u) + 1 : -1);
  }
}

// --- clusters

// Every block sums the numbers of all blocks of its cluster.
__global__ void cluster_sums(float* out) {
  FD_SHARED(float, mine, 1);
  FD_DYNAMIC_SHARED(bytes);
  float* const own = reinterpret_cast<float*>(bytes);
  if (threadIdx.x == 0) *mine = float(blockIdx.x);
  own[threadIdx.x] = float(cluster_rank() * 100 + threadIdx.x);
  cluster_sync();
  float sum = 0;
  for (unsigned rank = 0; rank < 4; ++rank) {
    sum += *cluster_peer(mine, rank) + *cluster_peer(own + threadIdx.x, rank);
  }
  if (!fault("missing-last-cluster-sync")) cluster_sync();
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

void test_cluster_sums() {
  const unsigned clusters = 3, threads = 32;
  std::vector<float> out(clusters * 4 * threads);
  cuda_on_cpu::launch(clusters * 4, threads, 4, threads * sizeof(float),
                      [&] { cluster_sums(out.data()); });
  for (unsigned i = 0; i < out.size(); ++i) {
    const unsigned first_block = i / threads / 4 * 4;
    expect("sum of cluster", out[i], 4 * first_block + 6 + 600 + 4 * (i % threads));
  }
}

// --- tests that matter only with a fault

struct alignas(16) Pack {
  float v[4];
};

void test_vector_load() {
  std::vector<float> in(8, 2.f), out(32);
  cuda_on_cpu::launch(1, 32, 1, 0, [&] {
    const float* const p = in.data() + (fault("misaligned-load") ? 1 : 0);
    const Pack pack = *reinterpret_cast<const Pack*>(p);
    out[threadIdx.x] = pack.v[3];
  });
  for (const float v : out) expect("vector load", v, 2);
}

void test_convergence() {
  cuda_on_cpu::launch(2, 64, 1, 0, [] {
    if (fault("divergent-barrier") && threadIdx.x < 8) __syncthreads();
    if (fault("divergent-barrier") && threadIdx.x >= 60) return;
    __syncwarp();
    __syncthreads();
  });
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) planted = argv[1];
  test_shuffles<int>();
  test_shuffles<float>();
  test_shuffles<double>();
  test_warps();
  test_block_sums();
  test_reversal();
  test_much_shared_memory();
  test_early_exit();
  test_cluster_sums();
  test_vector_load();
  test_convergence();
  test_lane_groups();
  test_copies();
  test_cluster_barriers();
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures != 0;
}
