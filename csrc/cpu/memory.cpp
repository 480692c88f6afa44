// Memory on a CPU: pages, what a thread keeps, and gradients whose memory is used again.
#include "cpu/memory.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <mutex>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastdiv {
namespace {
constexpr uintptr_t kHuge = uintptr_t(2) << 20;  // a huge page
}

// The first write of new memory costs more in page faults than the arithmetic of a gradient: in 4
// KiB pages 64 MiB take about five times as long.
void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) & ~(kHuge - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

void* thread_memory(int64_t bytes) {
  static thread_local std::vector<char> memory;
  constexpr int64_t kLine = 64;
  if (int64_t(memory.size()) < bytes + kLine) memory.resize(bytes + kLine);
  const auto begin = reinterpret_cast<uintptr_t>(memory.data());
  return memory.data() + (kLine - begin % kLine) % kLine;
}

namespace warm {
namespace {

struct Block {
  void* memory = nullptr;
  int64_t bytes = 0;
};

struct Memory {
  std::mutex mutex;
  int keepers = 0;
  Block waiting[4];  // the one that was given back last comes first

  // Return the block of so many bytes, and forget it.
  void* remove(int64_t bytes) {
    for (Block& b : waiting)
      if (b.bytes == bytes) return std::exchange(b, {}).memory;
    return nullptr;
  }
  void free_waiting() {
    for (Block& b : waiting) std::free(std::exchange(b, {}).memory);
  }
};

// It is never destroyed, because a gradient may live longer than anything static.
Memory& all() {
  static Memory* const memory = new Memory;
  return *memory;
}

}  // namespace

void keep(bool begin) {
  const std::lock_guard<std::mutex> lock(all().mutex);
  all().keepers += begin ? 1 : -1;
  if (all().keepers == 0) all().free_waiting();
}

void* take(int64_t bytes) {
  if (uintptr_t(bytes) < kHuge) return nullptr;  // malloc keeps such memory itself
  {
    const std::lock_guard<std::mutex> lock(all().mutex);
    if (all().keepers == 0) return nullptr;
    if (void* const memory = all().remove(bytes)) return memory;
  }
  void* const memory = std::aligned_alloc(kHuge, (bytes + kHuge - 1) & ~(kHuge - 1));
  if (memory) advise_huge_pages(memory, bytes);
  return memory;
}

void give_back(void* memory, int64_t bytes) noexcept {
  const std::lock_guard<std::mutex> lock(all().mutex);
  Block* const first = std::begin(all().waiting);
  Block* const end = std::end(all().waiting);
  const auto waits = [=](const Block& b) { return b.bytes == bytes; };
  if (all().keepers == 0 || std::any_of(first, end, waits)) return std::free(memory);
  // The others move up to the first gap.  Without one, the oldest block goes.
  Block* gap = std::find_if(first, end, [](const Block& b) { return !b.memory; });
  if (gap == end) std::free((--gap)->memory);
  std::copy_backward(first, gap, gap + 1);
  *first = {memory, bytes};
}

void empty() {
  const std::lock_guard<std::mutex> lock(all().mutex);
  all().free_waiting();
}

int64_t waiting_bytes() {
  const std::lock_guard<std::mutex> lock(all().mutex);
  int64_t sum = 0;
  for (const Block& b : all().waiting) sum += b.bytes;
  return sum;
}

}  // namespace warm
}  // namespace fastdiv
