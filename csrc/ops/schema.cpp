// The private ops, for whatever devices have kernels.
#include "ops/arguments.h"

STABLE_TORCH_LIBRARY(fastdiv, m) {
  m.def("_row_forward(Tensor x, " FD_ROWS_SCHEMA FD_OPTIONS_SCHEMA
        ") -> (Tensor value, Tensor record, Tensor divisor)");
  m.def("_row_forward_stats(Tensor x, " FD_ROWS_SCHEMA FD_OPTIONS_SCHEMA
        ") -> (Tensor value, Tensor record, Tensor divisor, Tensor stats, Tensor argmax)");
  m.def("_row_backward(Tensor grad, Tensor x, " FD_ROWS_SCHEMA
        "Tensor record, Tensor divisor, " FD_OPTIONS_SCHEMA
        ", bool need_x, bool need_t) -> (Tensor dx, Tensor dt)");
  m.def("_row_backward_(Tensor grad, Tensor(a!) x, " FD_ROWS_SCHEMA
        "Tensor record, Tensor divisor, " FD_OPTIONS_SCHEMA ", bool need_t) -> Tensor dt");
  m.def("_row_forward_grad(Tensor grad, Tensor(a!) x, " FD_ROWS_SCHEMA FD_OPTIONS_SCHEMA
        ", bool need_t) -> (Tensor value, Tensor dt)");
  m.def("_row_terms(Tensor x, " FD_ROWS_SCHEMA "Tensor record, " FD_OPTIONS_SCHEMA ") -> Tensor");
}
