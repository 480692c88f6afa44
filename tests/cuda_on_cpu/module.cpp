// The module fastdiv._C of a build whose CPU ops are the CUDA kernels, which run on the CPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "losses/registry.h"

PYBIND11_MODULE(_C, m) {
  const std::vector<std::string> names{"cuda_on_cpu"};
  m.def("loss_names", [] {
    return std::vector<std::string>(std::begin(fastdiv::kLossNames), std::end(fastdiv::kLossNames));
  });
  m.def("cpu_isa", [=] { return names[0]; });
  m.def("set_cpu_isa", [=](const std::string& name) { return name == names[0]; });
  m.def("cpu_isas", [=] { return names; });
  m.def("built_cpu_isas", [=] { return names; });
  m.attr("compiler") = "g++ " __VERSION__;
  m.attr("cuda_architectures") = "";
  m.attr("cuda_toolkit") = "";
  m.def("gpu_trouble", [](int) { return std::string("there is no GPU"); });
}
