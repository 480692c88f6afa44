// The private ops on CUDA: finds the device and stream of a call and launches, without
// synchronising.
#include <mutex>
#include <stdexcept>
#include <string>

#include "cuda/kernels.h"
#include "ops/call.h"

#if defined(FD_CUDA_ON_CPU)  // in the tests, kernels run on the CPU and on its tensors

#define FD_CUDA_KEY CPU
namespace fastdiv {
namespace {
struct Current {
  explicit Current(int32_t) {}
  void* stream = nullptr;
  static int32_t device_type() { return aoti_torch_device_type_cpu(); }
};
}  // namespace
}  // namespace fastdiv

#else

#define FD_CUDA_KEY CUDA
#include <torch/csrc/stable/accelerator.h>

// Defined in libtorch_cuda.  It is weak, so that the same binary loads with a CPU-only torch.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace fastdiv {
namespace {
// Makes the device of the call's tensors current, as long as this object exists; has its stream.
struct Current {
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;

  explicit Current(int32_t index) : guard(index) {
    require(aoti_torch_get_current_cuda_stream != nullptr, "fastdiv: this torch has no CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  }
  static int32_t device_type() { return aoti_torch_device_type_cuda(); }
};
}  // namespace
}  // namespace fastdiv

#endif

namespace fastdiv {
namespace {

void check(cuda::Status status) {
  if (status) throw std::runtime_error("fastdiv: CUDA: " + std::string(status));
}

const cuda::Gpu& gpu(int32_t index) {
  constexpr int kMaxDevices = 64;
  static cuda::Gpu known[kMaxDevices];
  static std::once_flag described[kMaxDevices];
  require(index < kMaxDevices, "fastdiv: more GPUs than expected");
  std::call_once(described[index], [=] { check(cuda::describe(index, &known[index])); });
  return known[index];
}

struct CudaDevice {
  using Kernels = cuda::RowKernels;
  static constexpr bool kKeepsOverwritten = true;

  const int32_t index;
  const Current current{index};

  explicit CudaDevice(const Tensor& x) : index(x.is_cpu() ? 0 : x.get_device_index()) {}

  static int32_t type() { return Current::device_type(); }
  static const cuda::RowKernels* find(LossId loss, Target target, DType dtype) {
    return cuda::find_kernels(loss, target, dtype);
  }
  static void before_first_write(void*, int64_t) {}
  // Torch's allocator keeps the memory of a GPU.
  static OptionalTensor warm_gradient(const Tensor&) { return std::nullopt; }

  void run(cuda::RowKernel kernel, const RowArgs& args) const {
    require(args.classes <= cuda::kMaxClasses, "fastdiv: more than 2^30 classes");
    check(kernel(args, gpu(index), current.stream));
  }

  // Reading labels would synchronise.  Instead, a label out of range makes its row NaN.
  static void check_labels(const RowArgs&) {}

  static void clear(Tensor number) { torch::stable::zero_(number); }
  void reduce(const RowArgs& a, bool mean, double batch, void* value, void* divisor) const {
    check(cuda::reduce_rows(a, mean, batch, value, divisor, current.stream));
  }
};

}  // namespace
}  // namespace fastdiv

STABLE_TORCH_LIBRARY_IMPL(fastdiv, FD_CUDA_KEY, m) {
  fastdiv::register_ops<fastdiv::CudaDevice>(m);
}
