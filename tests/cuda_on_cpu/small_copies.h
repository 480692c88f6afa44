// The copies of 16 bytes that one thread has asked for and not waited for: cp.async.
#pragma once

#include <cstdint>
#include <vector>

#include "engine.h"

namespace cuda_on_cpu {

struct SmallCopy {
  void* to;
  const void* from;
  unsigned group;
  Engine* engine;  // the group's
  const void* site;
  bool landed = false;
};

struct SmallCopies {
  std::vector<SmallCopy> pending;  // in the order of the requests
  unsigned group = 0;              // the number of the group that is not committed
  Engine* engine = nullptr;        // of that group, if it has a copy
  Engines engines;
  uint64_t issued = 0, landed = 0;  // for TSan: what came before a request and before a wait
};

}  // namespace cuda_on_cpu
