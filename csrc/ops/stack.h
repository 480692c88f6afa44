// The arguments and results of an op, as torch's stable ABI passes them.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>

namespace fastdiv {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The Python side checks what users pass, with better messages; this repeats what protects memory.
inline void require(bool ok, const char* message) {
  if (!ok) throw std::invalid_argument(message);
}

class Stack {
 public:
  Stack(StableIValue* values, uint64_t n_arguments, uint64_t n_results)
      : values_(values), n_arguments_(n_arguments), n_results_(n_results) {}

  // Return the next argument, in the order of the schema.  A tensor then belongs to the caller, so
  // take all arguments before anything can throw.
  template <class T>
  T take() {
    return torch::stable::detail::to<T>(values_[next_++]);
  }

  // Put the results where the arguments were.
  template <class... Tensors>
  void give(const Tensors&... results) {
    require(next_ == n_arguments_ && sizeof...(results) == n_results_,
            "fastdiv: the op and its schema differ");
    size_t i = 0;
    ((values_[i++] = torch::stable::detail::from(results)), ...);
  }

 private:
  StableIValue* values_;
  uint64_t n_arguments_, n_results_, next_ = 0;
};

}  // namespace fastdiv
