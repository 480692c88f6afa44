// Prints how csrc/cuda would launch the kernels of every loss, as JSON: nothing is launched.
//   launch_shapes CLASSES ARCHITECTURE=BYTES...    bytes of shared memory that a block may have
// The launches themselves compute the shapes.  `launch` is overloaded here and prints its grid.
#include <cxxabi.h>

#include <cstdio>
#include <cstdlib>
#include <typeinfo>

#include "cuda/rows.cuh"
#include "losses/find_kernels.h"

namespace fastdiv {
namespace cuda {

using real = float;

// Kernels are declared and not compiled, because compiling them takes most of the time.
#define FD_DECLARE(kernel, ...) extern template decltype(kernel<__VA_ARGS__>) kernel<__VA_ARGS__>;
#define FD_DECLARE_ALL(T, ...)                           \
  FD_DECLARE(forward_rows, __VA_ARGS__, T, false, false) \
  FD_DECLARE(forward_rows, __VA_ARGS__, T, true, false)  \
  FD_DECLARE(forward_rows, __VA_ARGS__, T, false, true)  \
  FD_DECLARE(forward_rows, __VA_ARGS__, T, true, true)   \
  FD_DECLARE(backward_rows, __VA_ARGS__, T, false)       \
  FD_DECLARE(backward_rows, __VA_ARGS__, T, true)
#define FD_DECLARE_DTYPES(name, ...) \
  FD_DECLARE_ALL(float, __VA_ARGS__) \
  FD_DECLARE_ALL(BFloat16, __VA_ARGS__)
// Applies a macro to a divergence with each kind of target.
#define FD_TARGETS(macro, name, policy)                                                   \
  macro(name, policy<real, Target::kLogits>) macro(name, policy<real, Target::kLogProbs>) \
      macro(name, policy<real, Target::kProbs>)
#define FD_DECLARE_TARGETS(name, policy) FD_TARGETS(FD_DECLARE_DTYPES, name, policy)
FD_ROW_LOSSES(FD_DECLARE_DTYPES)
FD_DIVERGENCES(FD_DECLARE_TARGETS)

// What is launched next.
struct Launched {
  const char *loss, *policy, *target, *dtype, *kernel;
  int architecture, element, rows, passes;
} launched;
const char* separator = "[";

// In how many stages a block's part of a row arrives; 1 where a shape has none.
template <class Shape>
auto stages_of(const Shape& s, int) -> decltype(s.slice / s.stage) {
  return (s.slice + s.stage - 1) / s.stage;
}
template <class Shape>
int stages_of(const Shape&, long) {
  return 1;
}

template <class Shape>
Status launch(void (*)(RowArgs, Shape), const Grid& grid, void*, RowArgs a, Shape shape) {
  const Launched& k = launched;
  std::printf("%s\n{\"loss\": \"%s\", \"policy\": \"%s\", \"target\": \"%s\", \"dtype\": \"%s\"",
              separator, k.loss, k.policy, k.target, k.dtype);
  std::printf(", \"kernel\": \"%s\", \"architecture\": %d, \"element\": %d, \"rows\": %d", k.kernel,
              k.architecture, k.element, k.rows);
  std::printf(", \"passes\": %d, \"classes\": %d, \"threads\": %d, \"blocks\": %d", k.passes,
              int(a.classes), grid.threads, int(grid.blocks / a.rows));
  std::printf(", \"stages\": %d, \"dynamic_bytes\": %d}", stages_of(shape, 0), int(grid.shared));
  separator = ",";
  return nullptr;
}

template <class P>
const char* target_name() {
  if (P::kNamed) return "named";
  if (P::kReadsLabel) return "labels";
  const char* const names[] = {"none", "logits", "log_probs", "probs"};
  return names[int(P::kTarget)];
}

template <class P, class T>
void print_launches(const char* loss, const char* dtype, const RowArgs& a, const Gpu& gpu) {
  char* const policy = abi::__cxa_demangle(typeid(P).name(), nullptr, nullptr, nullptr);
  launched = {loss,
              policy,
              target_name<P>(),
              dtype,
              "forward",
              gpu.architecture,
              sizeof(T),
              P::kTarget == Target::kNone ? 1 : 2,
              has_moment<P>() ? 1 : 2};
  launch_forward<P, T, false>(a, gpu, nullptr);
  launched.kernel = "backward";
  launch_backward<P, T>(a, gpu, nullptr);
  launched.kernel = "forward_grad";
  if constexpr (!P::kNamed) launch_forward<P, T, true>(a, gpu, nullptr);
  std::free(policy);
}

template <class P>
void print_dtypes(const char* loss, const RowArgs& a, const Gpu& gpu) {
  if constexpr (!P::kStats) {
    print_launches<P, float>(loss, "f32", a, gpu);
    print_launches<P, BFloat16>(loss, "bf16", a, gpu);
  }
}

}  // namespace cuda
}  // namespace fastdiv

int main(int argc, char** argv) {
  using namespace fastdiv;
  using namespace fastdiv::cuda;
  RowArgs a;
  a.rows = 1;
  a.classes = std::atoi(argv[1]);
  for (int i = 2; i < argc; ++i) {
    Gpu gpu;
    if (std::sscanf(argv[i], "%d=%ld", &gpu.architecture, &gpu.shared_memory) != 2) return 1;
    gpu.max_cluster = max_cluster_of(gpu.architecture);
#define FD_PRINT(name, ...) print_dtypes<__VA_ARGS__>(#name, a, gpu);
#define FD_PRINT_TARGETS(name, policy) FD_TARGETS(FD_PRINT, name, policy)
    FD_ROW_LOSSES(FD_PRINT)
    FD_DIVERGENCES(FD_PRINT_TARGETS)
  }
  std::printf("\n]\n");
}
