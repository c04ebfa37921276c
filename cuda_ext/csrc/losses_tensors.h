// What the bindings of sample_losses on CPU and GPU share.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "losses.h"

namespace samplewise {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What the ops take, checked where a wrong argument would corrupt memory: logits (R, V) with the classes side by side,
// labels int64 (R,) contiguous.
struct LabelledLogits {
  Tensor logits, labels;
  int64_t rows, classes, stride;

  LabelledLogits(const Tensor& given, const Tensor& given_labels) {
    STD_TORCH_CHECK(given.dim() == 2 && given_labels.dim() == 1 && given_labels.size(0) == given.size(0) &&
                        given_labels.scalar_type() == ScalarType::Long && same_device(given, given_labels),
                    "sample_losses: logits must be (R, V) and labels int64 (R,), on one device");
    logits = given.size(1) < 2 || given.stride(1) == 1 ? given : torch::stable::contiguous(given);
    labels = torch::stable::contiguous(given_labels);
    rows = logits.size(0), classes = logits.size(1), stride = logits.stride(0);
  }

  const int64_t* label() const { return (const int64_t*)labels.const_data_ptr(); }

  Tensor empty(std::initializer_list<int64_t> size) const {
    return torch::stable::new_empty(logits, size, ScalarType::Float);
  }

  // state (R, 4), contiguous, for the gradient of losses whose own is grad (R,).
  Tensor checked(const Tensor& grad, const Tensor& state) const {
    STD_TORCH_CHECK(grad.dim() == 1 && grad.size(0) == rows && grad.scalar_type() == ScalarType::Float &&
                        state.dim() == 2 && state.size(0) == rows && state.size(1) == kState &&
                        state.scalar_type() == ScalarType::Float && same_device(logits, grad) &&
                        same_device(logits, state),
                    "sample_losses_backward: grad must be float32 (R,), state float32 (R, 4), on the logits' device");
    return torch::stable::contiguous(state);
  }

  // f(element of the logits)
  template <class F>
  void dispatch(F&& f) const {
    const ScalarType type = logits.scalar_type();
    if (type == ScalarType::Float) return f(float{});
    if (type == ScalarType::BFloat16) return f(Bf16{});
    if (type == ScalarType::Half) return f(Fp16{});
    STD_TORCH_CHECK(false, "sample_losses: logits must be float32, bfloat16 or float16");
  }

 private:
  static bool same_device(const Tensor& a, const Tensor& b) {
    return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
  }
};

}  // namespace samplewise
