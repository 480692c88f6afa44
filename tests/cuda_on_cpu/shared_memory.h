// The shared memory of a block, and where the arrays of a kernel lie in it.
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
  const void* site;  // the address of a static that identifies the declaration; null: dynamic
  size_t offset, bytes;
};

// The arrays of a kernel, at the same places in every block of a launch.  A declaration gets its
// place when the first thread reaches it.  The bytes between arrays must not be accessed.
class SharedLayout {
 public:
  // `allowed` is how many dynamic bytes the launch was allowed to ask for; 0: it did not ask.
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

  // Return whether bytes at an offset lie in one array.
  bool holds(size_t offset, size_t bytes) const {
    for (const Slot& slot : slots_) {
      if (offset >= slot.offset && offset + bytes <= slot.offset + slot.bytes) return true;
    }
    return false;
  }

  const Slot& add_static(const void* site, size_t bytes) {
    static_bytes_ += bytes;
    return add(site, bytes);
  }

  // The size of a block's memory with the bytes between the arrays.
  static constexpr size_t kArena = kMaxSharedBytes + (64 << 10);

 private:
  // The alignment is 16 bytes and no better, so that UBSan finds code that relies on more.
  const Slot& add(const void* site, size_t bytes) {
    constexpr size_t kAlignment = 16, kGap = 128;
    const size_t offset = (end_ / kGap + 2) * kGap + kAlignment;
    end_ = offset + bytes;
    check_sizes();
    if (end_ + kGap > kArena) too_much("there is no room for the bytes between the arrays");
    slots_.push_back({site, offset, bytes});
    return slots_.back();
  }

  // Check the rules of a GPU.  Here a static array counts once a thread reaches its declaration; on
  // a GPU all of a kernel's arrays count.
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

// The bytes of a block.  Outside of a block's lifetime they are NaN bits, and poisoned with ASan.
class SharedMemory {
 public:
  SharedMemory() : bytes_(static_cast<char*>(std::aligned_alloc(128, SharedLayout::kArena))) {
    std::memset(bytes_.get(), kNaN, SharedLayout::kArena);
    sanitizers::poison(bytes_.get(), SharedLayout::kArena);
  }

  char* at(const Slot& slot) const { return bytes_.get() + slot.offset; }
  char* at(size_t offset) const { return bytes_.get() + offset; }

  // Return the offset of an address, or kArena if it lies outside.
  size_t offset_of(const void* p) const {
    const char* const c = static_cast<const char*>(p);
    const bool inside = c >= bytes_.get() && c < bytes_.get() + SharedLayout::kArena;
    return inside ? size_t(c - bytes_.get()) : SharedLayout::kArena;
  }

  void open(const Slot& slot) { sanitizers::unpoison(at(slot), slot.bytes); }
  void open(const SharedLayout& layout) {
    for (const Slot& slot : layout.slots()) open(slot);
  }

  // The last thread of the block calls this, watched by TSan: the fill is a write that must come
  // after all reads by the other blocks of the cluster.
  void close(const SharedLayout& layout) {
    for (const Slot& slot : layout.slots()) {
      std::memset(at(slot), kNaN, slot.bytes);
      sanitizers::poison(at(slot), slot.bytes);
    }
  }

 private:
  static constexpr int kNaN = 0xff;  // a floating-point number of such bytes is NaN

  struct Free {
    void operator()(char* p) const {
      sanitizers::unpoison(p, SharedLayout::kArena);
      std::free(p);
    }
  };
  std::unique_ptr<char, Free> bytes_;
};

}  // namespace cuda_on_cpu
