// Kernels that copy asynchronously, and what may go wrong in them.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "selftest.h"

namespace {

constexpr unsigned kThreads = 64;

// --- bulk copies through a ring of slots, which are used again

constexpr unsigned kSlots = 3, kStage = 2 * kThreads;  // floats of a slot

__global__ void pipeline(const float* in, unsigned stages, float* out) {
  FD_SHARED(float, ring, kSlots* kStage);
  FD_SHARED(ArrivalBarrier, full, kSlots);
  const auto fetch = [&](unsigned stage) {
    const unsigned slot = stage % kSlots;
    unsigned bytes = kStage * sizeof(float);
    barrier_expect(full + slot, bytes);
    const bool last = stage == stages - 1;
    if (fault("copy-of-no-size")) bytes = 24;
    if (fault("copy-past-global") && last) bytes += 16;
    const unsigned off = fault("misaligned-copy") ? 2 : 0;
    const unsigned past = fault("copy-past-shared") && slot == kSlots - 1 ? 4 : 0;
    copy_bulk(ring + slot * kStage + past, in + stage * kStage + off, bytes, full + slot);
  };
  if (threadIdx.x == 0) {
    for (unsigned slot = 0; slot < kSlots; ++slot) barrier_init(full + slot, 1);
    if (!fault("missing-init-fence")) barrier_init_fence();
    for (unsigned stage = 0; stage < kSlots && stage < stages; ++stage) fetch(stage);
  }
  if (!fault("init-without-barrier")) __syncthreads();
  float sum = 0;
  for (unsigned stage = 0; stage < stages; ++stage) {
    const unsigned slot = stage % kSlots, parity = stage / kSlots % 2;
    if (!fault("unawaited-stage")) barrier_wait(full + slot, parity);
    if (fault("wrong-parity") && stage == 1) barrier_wait(full + slot, parity ^ 1);
    const float* const numbers = ring + slot * kStage;
    sum = 2 * sum + numbers[threadIdx.x] - numbers[kStage - 1 - threadIdx.x];
    if (!fault("early-refill")) __syncthreads();  // all threads have read the slot
    if (threadIdx.x == 0 && stage + kSlots < stages) {
      if (!fault("missing-fence")) fence_before_copy();
      fetch(stage + kSlots);
    }
  }
  out[threadIdx.x] = sum;
}

void test_pipeline(unsigned stages) {
  std::vector<float> in(stages * kStage), out(2 * kThreads);
  for (size_t i = 0; i < in.size(); ++i) in[i] = float(i * i % 1001);
  if (fault("bulk-copy-on-ampere")) setenv("FASTDIV_SHIM_ARCHITECTURE", "80", 1);
  cuda_on_cpu::launch(2, kThreads, 1, 0,
                      [&] { pipeline(in.data(), stages, out.data() + blockIdx.x * kThreads); });
  for (unsigned i = 0; i < out.size(); ++i) {
    float sum = 0;
    for (unsigned stage = 0; stage < stages; ++stage) {
      const float* const numbers = in.data() + stage * kStage;
      sum = 2 * sum + numbers[i % kThreads] - numbers[kStage - 1 - i % kThreads];
    }
    expect("result of pipeline", out[i], sum);
  }
}

// Every thread frees a slot itself: the issuing thread waits for all arrivals at a second barrier.
__global__ void handshake(const float* in, unsigned stages, float* out) {
  FD_SHARED(float, slot, kStage);
  FD_SHARED(ArrivalBarrier, full, 1);
  FD_SHARED(ArrivalBarrier, empty, 1);
  if (threadIdx.x == 0) {
    barrier_init(full, 1);
    barrier_init(empty, fault("too-few-expected") ? blockDim.x - 1 : blockDim.x);
    barrier_init_fence();
  }
  __syncthreads();
  float sum = 0;
  for (unsigned stage = 0; stage < stages; ++stage) {
    if (threadIdx.x == 0) {
      if (stage > 0) barrier_wait(empty, (stage - 1) % 2);
      fence_before_copy();
      // Two copies on one barrier; the bytes of the first may come before they are expected.
      copy_bulk(slot, in + stage * kStage, kStage * 2, full);
      barrier_expect(full, kStage * 4);
      copy_bulk(slot + kStage / 2, in + stage * kStage + kStage / 2, kStage * 2, full);
    }
    barrier_wait(full, stage % 2);
    sum = 2 * sum + slot[threadIdx.x] - slot[kStage - 1 - threadIdx.x];
    barrier_arrive(empty);
  }
  out[threadIdx.x] = sum;
}

void test_handshake() {
  constexpr unsigned stages = 4;
  std::vector<float> in(stages * kStage), out(kThreads);
  for (size_t i = 0; i < in.size(); ++i) in[i] = float(i * i % 77);
  cuda_on_cpu::launch(1, kThreads, 1, 0, [&] { handshake(in.data(), stages, out.data()); });
  for (unsigned i = 0; i < kThreads; ++i) {
    float sum = 0;
    for (unsigned stage = 0; stage < stages; ++stage)
      sum = 2 * sum + in[stage * kStage + i] - in[stage * kStage + kStage - 1 - i];
    expect("result of handshake", out[i], sum);
  }
}

// --- a row that begins anywhere: a thread joins two aligned packs

struct alignas(16) Pack {
  uint16_t v[8];
};

__global__ void joined_packs(const uint16_t* row, uint16_t* out) {
  FD_SHARED(Pack, packs, kThreads + 1);
  FD_SHARED(ArrivalBarrier, full, 1);
  const unsigned lead = unsigned(uintptr_t(row) / sizeof(uint16_t) % 8);
  if (threadIdx.x == 0) {
    barrier_init(full, 1);
    barrier_init_fence();
    const unsigned bytes = (kThreads + (lead ? 1 : 0)) * unsigned(sizeof(Pack));
    barrier_expect(full, bytes);
    copy_bulk(packs, row - lead, bytes, full);
  }
  __syncthreads();
  barrier_wait(full, 0);
  const Pack two[2] = {packs[threadIdx.x], packs[threadIdx.x + (lead ? 1 : 0)]};
  for (unsigned i = 0; i < 8; ++i) {
    out[8 * threadIdx.x + i] = two[(i + lead) / 8].v[(i + lead) % 8];
  }
}

void test_joined_packs() {
  std::vector<Pack> memory(kThreads + 1);
  uint16_t* const in = memory[0].v;
  for (unsigned i = 0; i < 8 * (kThreads + 1); ++i) in[i] = uint16_t(7 * i);
  for (unsigned lead = 0; lead < 8; ++lead) {
    std::vector<uint16_t> out(8 * kThreads);
    cuda_on_cpu::launch(1, kThreads, 1, 0, [&] { joined_packs(in + lead, out.data()); });
    for (unsigned i = 0; i < out.size(); i += 5) expect("joined", out[i], uint16_t(7 * (i + lead)));
  }
}

// --- copies of 16 bytes, for which their thread waits

constexpr unsigned kDepth = 3, kLanes = 32;

struct alignas(16) Numbers {
  float v[4];
};

// Each thread has a ring of its own.  No barrier is needed.
__global__ void ring_of_thread(const Numbers* in, unsigned stages, float* out) {
  FD_SHARED(Numbers, ring, kDepth * kLanes);
  const auto fetch = [&](unsigned stage) {
    Numbers* const slot = ring + stage % kDepth * kLanes + threadIdx.x;
    const unsigned off = fault("misaligned-copy-16") ? 1 : 0;
    const unsigned past = fault("copy-16-past-global") && stage == stages - 1 ? 1 : 0;
    if (stage < stages) copy_16(slot, in[(stage + past) * kLanes + threadIdx.x].v + off);
    copies_commit();
  };
  for (unsigned stage = 0; stage < kDepth - 1; ++stage) fetch(stage);
  float sum = 0;
  for (unsigned stage = 0; stage < stages; ++stage) {
    fetch(stage + kDepth - 1);
    if (!fault("unawaited-copy-16")) copies_wait<kDepth - 1>();
    const unsigned reader = threadIdx.x ^ (fault("copy-16-of-another") ? 1 : 0);
    const Numbers& numbers = ring[stage % kDepth * kLanes + reader];
    sum = 2 * sum + numbers.v[0] - numbers.v[3];
  }
  if (!fault("exit-before-copies")) copies_wait<0>();
  if (fault("exit-before-copies")) fetch(0);
  out[threadIdx.x] = sum;
}

void test_ring_of_thread() {
  setenv("FASTDIV_SHIM_ARCHITECTURE", "80", 1);  // Ampere is enough
  constexpr unsigned stages = 5;
  std::vector<Numbers> in(stages * kLanes);
  for (unsigned i = 0; i < in.size(); ++i)
    for (unsigned j = 0; j < 4; ++j) in[i].v[j] = float((i + 3 * j) * i % 999);
  std::vector<float> out(kLanes);
  cuda_on_cpu::launch(1, kLanes, 1, 0, [&] { ring_of_thread(in.data(), stages, out.data()); });
  unsetenv("FASTDIV_SHIM_ARCHITECTURE");
  for (unsigned i = 0; i < kLanes; ++i) {
    float sum = 0;
    for (unsigned stage = 0; stage < stages; ++stage) {
      const Numbers& numbers = in[stage * kLanes + i];
      sum = 2 * sum + numbers.v[0] - numbers.v[3];
    }
    expect("result of ring", out[i], sum);
  }
}

// Threads read what others have copied, after a barrier.
void test_shared_tile() {
  std::vector<Numbers> in(kLanes);
  for (unsigned i = 0; i < kLanes; ++i) in[i].v[0] = float(i);
  std::vector<float> out(kLanes);
  cuda_on_cpu::launch(1, kLanes, 1, 0, [&] {
    FD_SHARED(Numbers, tile, kLanes);
    copy_16(tile + threadIdx.x, &in[threadIdx.x]);
    copies_commit();
    copies_wait<0>();
    if (!fault("tile-without-barrier")) __syncthreads();
    out[threadIdx.x] = tile[kLanes - 1 - threadIdx.x].v[0];
  });
  for (unsigned i = 0; i < kLanes; ++i) expect("of tile", out[i], kLanes - 1 - i);
}

// --- rules of barriers

void test_rules() {
  std::vector<float> in(64);
  cuda_on_cpu::launch(1, 1, 1, 0, [&] {
    FD_SHARED(ArrivalBarrier, b, 2);
    FD_SHARED(float, slot, 64);
    if (!fault("no-init")) barrier_init(b, 1);
    if (fault("second-init")) barrier_init(b, 1);
    barrier_init_fence();
    if (fault("too-many-bytes")) barrier_init(b + 1, 2), barrier_expect(b + 1, 1 << 20);
    barrier_expect(b, 256);
    if (fault("too-many-arrivals")) barrier_arrive(b);
    if (fault("barrier-overwritten")) std::memset(b, 0, 8);
    copy_bulk(slot, in.data(), 256, b);
    if (fault("overlapping-copies")) copy_bulk(slot + 60, in.data(), 16, b);
    if (!fault("exit-before-bulk-copy")) barrier_wait(b, 0);
  });
}

}  // namespace

void test_copies() {
  for (const unsigned stages : {1, 3, 8}) test_pipeline(stages);
  test_handshake();
  test_joined_packs();
  test_ring_of_thread();
  test_shared_tile();
  test_rules();
}
