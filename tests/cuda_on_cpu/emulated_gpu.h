// The GPU that is emulated: an H100, unless the environment says otherwise.
// FASTDIV_SHIM_ARCHITECTURE=80 has no clusters; FASTDIV_SHIM_CLUSTER=1 has one block for each row,
// and so more stages than slots; FASTDIV_SHIM_SHARED_KB=99 has less room for them.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace cuda_on_cpu {

inline int from_environment(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value ? std::atoi(value) : otherwise;
}
inline int architecture() { return from_environment("FASTDIV_SHIM_ARCHITECTURE", 90); }
inline int64_t shared_memory() {
  return int64_t(from_environment("FASTDIV_SHIM_SHARED_KB", architecture() >= 90 ? 227 : 163))
         << 10;
}
// The most blocks of a cluster.
inline int max_cluster() {
  return architecture() >= 90 ? from_environment("FASTDIV_SHIM_CLUSTER", 8) : 1;
}

}  // namespace cuda_on_cpu
