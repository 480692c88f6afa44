// The schemas of the private ops.  Each device registers kernels for them: call.h.
#include <string>

#include "ops/arguments.h"

STABLE_TORCH_LIBRARY(fastdiv, m) {
  const std::string rows = fastdiv::RowTensors::kSchema, options = fastdiv::Options::kSchema;
  const std::string forward = "Tensor value, Tensor record, Tensor divisor";
  const std::string after_forward = rows + "Tensor record, Tensor divisor, " + options;
  const auto def = [&](const std::string& schema) { m.def(schema.c_str()); };
  def("_row_forward(Tensor " + rows + options + ") -> (" + forward + ")");
  def("_row_forward_stats(Tensor " + rows + options + ") -> (" + forward +
      ", Tensor stats, Tensor argmax)");
  def("_row_backward(Tensor grad, Tensor " + after_forward +
      ", bool need_x, bool need_t) -> (Tensor dx, Tensor dt)");
  def("_row_backward_(Tensor grad, Tensor(a!) " + after_forward + ", bool need_t) -> Tensor dt");
  def("_row_forward_grad(Tensor grad, Tensor(a!) " + rows + options +
      ", bool need_t) -> (Tensor value, Tensor dt)");
  def("_row_terms(Tensor " + rows + "Tensor record, " + options + ") -> Tensor");
}
