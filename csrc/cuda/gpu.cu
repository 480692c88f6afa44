// Describes the GPU, and finds the kernels of a dtype.
#include <utility>

#include "cuda/launch.cuh"
#include "cuda/launch_shapes.h"

namespace fastdiv {
namespace cuda {

#if defined(__CUDACC__)

namespace {
__global__ void probe() {}
}  // namespace

// The architecture is that of the code that runs, not of the GPU: PTX for Ampere has no clusters on
// a Hopper.
Status describe(int device, Gpu* gpu) {
  cudaFuncAttributes code{};
  if (const Status error = status_of(cudaFuncGetAttributes(&code, probe))) return error;
  int major = 0, minor = 0, shared = 0;
  const std::pair<cudaDeviceAttr, int*> attributes[] = {
      {cudaDevAttrComputeCapabilityMajor, &major},
      {cudaDevAttrComputeCapabilityMinor, &minor},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, &shared}};
  for (const auto& [attribute, value] : attributes)
    if (const Status error = status_of(cudaDeviceGetAttribute(value, attribute, device)))
      return error;
  const int capability = 10 * major + minor;
  const int architecture = capability < code.ptxVersion ? capability : code.ptxVersion;
  *gpu = {architecture, shared, max_cluster_of(architecture)};
  return nullptr;
}

#define FD_TEXT_OF(x) #x
#define FD_TEXT(x) FD_TEXT_OF(x)
const char* built_architectures() { return FD_CUDA_ARCHITECTURES; }
const char* toolkit() { return FD_TEXT(__CUDACC_VER_MAJOR__) "." FD_TEXT(__CUDACC_VER_MINOR__); }

#else

Status describe(int, Gpu* gpu) {
  *gpu = {cuda_on_cpu::architecture(), cuda_on_cpu::shared_memory(), cuda_on_cpu::max_cluster()};
  return nullptr;
}

#endif

const RowKernels* find_kernels(LossId loss, Target target, DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return find_f32(loss, target);
    case DType::kF64:
      return find_f64(loss, target);
    case DType::kF16:
      return find_f16(loss, target);
    case DType::kBF16:
      return find_bf16(loss, target);
  }
  return nullptr;
}

}  // namespace cuda
}  // namespace fastdiv
