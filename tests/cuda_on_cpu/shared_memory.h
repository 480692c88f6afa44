// The shared memory of a block, and where in it the arrays of a kernel lie.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "emulated_gpu.h"
#include "sanitizers.h"

namespace cuda_on_cpu {

// A block has this much unless the launch is allowed more; ptxas accepts no larger static arrays.
constexpr size_t kDefaultSharedBytes = 48 << 10;
constexpr size_t kMaxSharedBytes = 227 << 10;  // the most that any GPU here gives a block: sm_90

// One array in shared memory.
struct Slot {
  const void* site;  // the declaration, by the address of a static of its own; null: dynamic
  size_t offset, bytes;
};

// The arrays of a kernel, at the same places in every block of a launch.  A declaration gets its
// place when the first thread comes to it.  Between arrays lie bytes that nobody may touch.
class SharedLayout {
 public:
  // `allowed`: the dynamic bytes that the launch was allowed to ask for; 0: it did not ask.
  void reset(size_t dynamic_bytes, size_t allowed) {
    slots_.clear();
    end_ = static_bytes_ = 0;
    dynamic_bytes_ = dynamic_bytes;
    allowed_bytes_ = allowed;
    add(nullptr, dynamic_bytes);
  }

  const Slot& dynamic() const { return slots_.front(); }
  const std::vector<Slot>& slots() const { return slots_; }

  const Slot* find(const void* site) const {
    for (const Slot& slot : slots_) {
      if (slot.site == site) return &slot;
    }
    return nullptr;
  }

  const Slot& add_static(const void* site, size_t bytes) {
    static_bytes_ += bytes;
    return add(site, bytes);
  }

  // Of a block's memory, with the bytes between the arrays.
  static constexpr size_t kArena = kMaxSharedBytes + (64 << 10);

 private:
  // Aligned to 16 bytes and no better, so that UBSan sees who relies on more.
  const Slot& add(const void* site, size_t bytes) {
    constexpr size_t kAlignment = 16, kGap = 128;
    const size_t offset = (end_ / kGap + 2) * kGap + kAlignment;
    end_ = offset + bytes;
    check_sizes();
    if (end_ + kGap > kArena) too_much("there is no room for the bytes between the arrays");
    slots_.push_back({site, offset, bytes});
    return slots_.back();
  }

  // The rules by which a GPU refuses a launch.  Static arrays count from where a thread comes to
  // their declaration; on a GPU they count all, whether or not the kernel comes to them.
  void check_sizes() const {
    if (static_bytes_ > kDefaultSharedBytes) too_much("ptxas accepts 49152 static bytes");
    if (allowed_bytes_ == 0) {
      if (static_bytes_ + dynamic_bytes_ > kDefaultSharedBytes)
        too_much("a launch has 49152 bytes unless allow_dynamic_shared() is called before it");
      return;
    }
    if (dynamic_bytes_ > allowed_bytes_) too_much("that is more than was allowed");
    if (static_bytes_ + allowed_bytes_ > size_t(shared_memory()))
      too_much("the GPU has less than the static bytes and those allowed");
  }

  [[noreturn]] void too_much(const char* rule) const {
    std::fprintf(stderr, "cuda_on_cpu: %zu static and %zu dynamic bytes of shared memory, %zu %s",
                 static_bytes_, dynamic_bytes_, allowed_bytes_, "allowed: ");
    std::fprintf(stderr, "%s\n", rule);
    std::abort();
  }

  std::vector<Slot> slots_;
  size_t end_ = 0, static_bytes_ = 0, dynamic_bytes_ = 0, allowed_bytes_ = 0;
};

// A block's own bytes.  Outside of a block's lifetime they are NaN bits, and poisoned under ASan.
class SharedMemory {
 public:
  SharedMemory() : bytes_(static_cast<char*>(std::aligned_alloc(128, SharedLayout::kArena))) {
    std::memset(bytes_.get(), kNaN, SharedLayout::kArena);
    sanitizers::poison(bytes_.get(), SharedLayout::kArena);
  }

  char* at(const Slot& slot) const { return bytes_.get() + slot.offset; }
  char* at(size_t offset) const { return bytes_.get() + offset; }

  // Offset of an address within, or kArena if it is not.
  size_t offset_of(const void* p) const {
    const char* const c = static_cast<const char*>(p);
    const bool inside = c >= bytes_.get() && c < bytes_.get() + SharedLayout::kArena;
    return inside ? size_t(c - bytes_.get()) : SharedLayout::kArena;
  }

  void open(const Slot& slot) { sanitizers::unpoison(at(slot), slot.bytes); }
  void open(const SharedLayout& layout) {
    for (const Slot& slot : layout.slots()) open(slot);
  }

  // Called by the last thread of the block, while TSan looks: the fill is a write that must come
  // after whatever the block's cluster peers read here.
  void close(const SharedLayout& layout) {
    for (const Slot& slot : layout.slots()) {
      std::memset(at(slot), kNaN, slot.bytes);
      sanitizers::poison(at(slot), slot.bytes);
    }
  }

 private:
  static constexpr int kNaN = 0xff;  // every floating-point type made of such bytes is NaN

  struct Free {
    void operator()(char* p) const {
      sanitizers::unpoison(p, SharedLayout::kArena);
      std::free(p);
    }
  };
  std::unique_ptr<char, Free> bytes_;
};

}  // namespace cuda_on_cpu
