// When asynchronous copies land.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

#include "random.h"

namespace cuda_on_cpu {

// Chosen by FASTDIV_SHIM_COPIES:
//   late     (default) a copy lands when nothing else can go on, the oldest first
//   reverse  the same, but the latest first
//   eager    a copy lands at once
//   <seed>   at random times, in random order; the parts of a large copy land apart
// A kernel must give the same result with all of them.
struct Landing {
  bool eager = false, reverse = false, random = false;
  uint64_t state = 0;

  Landing() {
    const char* const chosen = std::getenv("FASTDIV_SHIM_COPIES");
    const std::string when = chosen && *chosen ? chosen : "late";
    eager = when == "eager";
    reverse = when == "reverse";
    random = when.find_first_not_of("0123456789") == std::string::npos;
    if (random) state = std::strtoull(chosen, nullptr, 10);
    if (!eager && !reverse && !random && when != "late") {
      std::fprintf(stderr, "cuda_on_cpu: FASTDIV_SHIM_COPIES is '%s', %s\n", chosen,
                   "not late, reverse, eager or a number");
      std::abort();
    }
  }

  // Return a random number below n.
  unsigned below(unsigned n) { return unsigned(Random{state}() % n); }
};

}  // namespace cuda_on_cpu
