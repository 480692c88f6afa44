// What the self-test's files share.
#pragma once

#include <cstdio>
#include <string>

#include "cuda_on_cpu.h"

inline std::string planted;  // the fault, if any
inline int checks = 0, failures = 0;

inline bool fault(const char* name) { return planted == name; }

inline void expect(const char* what, double got, double expected) {
  ++checks;
  if (got == expected || ++failures > 20) return;
  std::printf("%s is %g, expected %g\n", what, got, expected);
}

// Other files define these.
void test_copies();
void test_cluster_barriers();
