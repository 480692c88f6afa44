// The shared memory of a block, and where in it the arrays of a kernel lie.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "sanitizers.h"

namespace cuda_on_cpu {

constexpr size_t kMaxStaticBytes = 48 << 10;   // what ptxas accepts
constexpr size_t kMaxSharedBytes = 227 << 10;  // what a block may ask for on sm_90

// One array in shared memory.
struct Slot {
  const void* site;  // the declaration, by the address of a static of its own; null: dynamic
  size_t offset, bytes;
};

// The arrays of a kernel, at the same places in every block of a launch.  A declaration gets its
// place when the first thread comes to it.  Between arrays lie bytes that nobody may touch.
class SharedLayout {
 public:
  void reset(size_t dynamic_bytes) {
    slots_.clear();
    end_ = static_bytes_ = 0;
    total_bytes_ = dynamic_bytes;
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
    total_bytes_ += bytes;
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
    if (static_bytes_ > kMaxStaticBytes || total_bytes_ > kMaxSharedBytes || end_ + kGap > kArena) {
      std::fprintf(stderr, "cuda_on_cpu: too much shared memory: %zu bytes, of them %zu static\n",
                   total_bytes_, static_bytes_);
      std::abort();
    }
    slots_.push_back({site, offset, bytes});
    return slots_.back();
  }

  std::vector<Slot> slots_;
  size_t end_ = 0, static_bytes_ = 0, total_bytes_ = 0;
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
