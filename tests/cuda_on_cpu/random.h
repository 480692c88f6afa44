// Random numbers of a seed: splitmix64.
#pragma once

#include <cstdint>

namespace cuda_on_cpu {

struct Random {
  using result_type = uint64_t;
  uint64_t& state;

  static constexpr uint64_t min() { return 0; }
  static constexpr uint64_t max() { return ~uint64_t(0); }
  uint64_t operator()() {
    uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
  }
};

}  // namespace cuda_on_cpu
