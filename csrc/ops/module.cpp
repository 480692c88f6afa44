// The module fastdiv._C.  Loading it registers the ops; its functions tell what was built and what
// runs.

// TORCH_TARGET_VERSION limits torch's headers to its stable interface.  This file includes none of
// them, and the pybind11 of torch 2.11 cannot be included while the macro is defined.
#undef TORCH_TARGET_VERSION

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "losses/registry.h"
#include "cpu/kernels.h"
#include "cpu/memory.h"
#include "cuda/kernels.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of fastdiv.";
  m.def("loss_names", [] {
    return std::vector<std::string>(std::begin(fastdiv::kLossNames), std::end(fastdiv::kLossNames));
  });
  m.def("cpu_isa", [] { return std::string(fastdiv::instruction_set().name); });
  m.def("set_cpu_isa",
        [](const std::string& name) { return fastdiv::set_instruction_set(name.c_str()); });
  m.def("cpu_isas", [] {
    std::vector<std::string> names;
    for (int i = 0; i < fastdiv::kInstructionSetCount; ++i)
      if (fastdiv::kInstructionSets[i].supported())
        names.push_back(fastdiv::kInstructionSets[i].name);
    return names;
  });
  m.def("built_cpu_isas", [] {
    std::vector<std::string> names;
    for (int i = 0; i < fastdiv::kInstructionSetCount; ++i)
      names.push_back(fastdiv::kInstructionSets[i].name);
    return names;
  });
  m.def("advise_huge_pages", [](uintptr_t data, int64_t bytes) {
    fastdiv::advise_huge_pages(reinterpret_cast<void*>(data), bytes);
  });
  m.def("keep_gradients", fastdiv::warm::keep);
  m.def("empty_gradients", fastdiv::warm::empty);
  m.def("waiting_gradient_bytes", fastdiv::warm::waiting_bytes);
#if defined(FD_WITH_CUDA)
  m.attr("cuda_architectures") = fastdiv::cuda::built_architectures();
  m.attr("cuda_toolkit") = fastdiv::cuda::toolkit();
  m.def("gpu_trouble", [](int index) {
    fastdiv::cuda::Gpu gpu;
    const char* trouble = fastdiv::cuda::describe(index, &gpu);
    return std::string(trouble ? trouble : "");
  });
#else
  m.attr("cuda_architectures") = "";
  m.attr("cuda_toolkit") = "";
  m.def("gpu_trouble", [](int) { return std::string("built without CUDA kernels"); });
#endif
#if defined(__clang__)
  m.attr("compiler") = "clang " __clang_version__;
#else
  m.attr("compiler") = "g++ " __VERSION__;
#endif
}
