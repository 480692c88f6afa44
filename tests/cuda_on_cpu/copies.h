// Asynchronous copies into shared memory that a barrier waits for: requests and landing.
#pragma once

#include <algorithm>

#include "device.h"

namespace cuda_on_cpu {

constexpr unsigned char kNotLanded = 0xff;  // a floating-point number of such bytes is NaN

// Let the copy land; return whether that ends a phase.
inline bool land(const Copy& copy) {
  Thread* const current = std::exchange(device.current, copy.issuer);  // who does misuse
  std::memcpy(copy.to, copy.from ? copy.from : reinterpret_cast<const char*>(copy.words),
              copy.bytes);
  if (copy.from) copy.engine->read(copy.from, copy.bytes, copy.site);
  copy.engine->write(copy.to, copy.bytes, copy.site);
  Phases& barrier = *copy.barrier;
  copy.engine->release(barrier.current_order());
  copy.issuer->engines.give_back(copy.engine);
  barrier.filled = barrier.phase + 1;
  barrier.pending_bytes -= copy.bytes;
  if (barrier.pending_bytes < -kMaxPendingBytes) {
    misuse("%s: %lld bytes have landed in a phase that does not expect them", copy.what,
           -static_cast<long long>(barrier.pending_bytes));
  }
  device.current = current;
  return barrier.advance();
}

// Let one copy that is under way land; return whether that ends a phase.
inline bool land_one() {
  std::deque<Copy>& copies = device.in_flight;
  size_t which = device.landing.reverse ? copies.size() - 1 : 0;
  if (device.landing.random) which = device.landing.below(unsigned(copies.size()));
  const Copy copy = copies[which];
  copies.erase(copies.begin() + std::ptrdiff_t(which));
  return land(copy);
}

// Let copies land until threads that wait may go on; return false if none does.
inline bool land_until_a_phase_ends() {
  while (!device.in_flight.empty()) {
    if (land_one()) return true;
  }
  return false;
}

// Let a random number of copies land; return whether threads that wait may go on.
inline bool land_some() {
  bool ended = false;
  if (device.in_flight.empty()) return ended;
  for (unsigned n = device.landing.below(unsigned(device.in_flight.size()) + 1); n > 0; --n) {
    ended |= land_one();
  }
  return ended;
}

// Begin a copy that comes after what `after` knows of, for TSan.
inline void request(Copy copy, uint64_t* after) {
  for (const Copy& other : device.in_flight) {
    if (copy.to < other.to + other.bytes && other.to < copy.to + copy.bytes) {
      misuse("%s into memory that an earlier %s under way writes", copy.what, other.what);
    }
  }
  constexpr size_t kSpareEngines = 2;
  copy.engine = copy.issuer->engines.take(device.scheduler.tsan_thread(), kSpareEngines);
  copy.engine->acquire(&device.order);
  copy.engine->acquire(after);
  if (copy.from) {
    std::memset(copy.to, kNotLanded, copy.bytes);
    copy.engine->write(copy.to, copy.bytes, copy.site);
  }
  if (device.landing.eager)
    land(copy);
  else
    device.in_flight.push_back(copy);
}

// Begin a copy, in parts if copies land in random order.
inline void request_in_parts(Copy copy, uint64_t* after) {
  while (device.landing.random && copy.bytes > 16 && device.landing.below(4) != 0) {
    Copy part = copy;
    part.bytes = 16 * (1 + device.landing.below(copy.bytes / 16 - 1));
    copy.to += part.bytes;
    copy.from += part.bytes;
    copy.bytes -= part.bytes;
    request(part, after);
  }
  request(copy, after);
}

// Check that no copy into the block's memory is under way, or was until now by chance.
inline void check_exit_of_block() {
  Block& block = *device.current->block;
  for (const Copy& copy : device.in_flight) {
    if (copy.block == &block) misuse("the block exits while a %s into it is under way", copy.what);
  }
  block.arrival_barriers.each([](const Phases& barrier) {
    if (barrier.filled <= barrier.awaited) return;
    misuse("the block exits, and no thread has waited for the last bytes of a barrier");
  });
}

}  // namespace cuda_on_cpu
