// sample_losses and sample_losses_backward on CUDA devices: the kernels of cuda_losses.h on the current stream. A
// label that is no class gives NaN: an error would have to wait for the device.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <type_traits>

#include "cuda_losses.h"
#include "losses_tensors.h"
#include "stream.h"

namespace samplewise {
namespace {

using torch::stable::accelerator::DeviceGuard;

constexpr int kFew = 32, kMany = 256;  // threads of a block

// f(element of the logits, threads of a block)
template <class F>
void dispatch(const LabelledLogits& batch, F&& f) {
  batch.dispatch([&](auto element) {
    if (batch.classes <= kFew * kGroup) {
      f(element, std::integral_constant<int, kFew>{});
    } else {
      f(element, std::integral_constant<int, kMany>{});
    }
  });
}

template <class Kernel>
void start(const Kernel& kernel, int64_t blocks, int threads, const LabelledLogits& batch) {
  if (blocks == 0) return;
  STD_TORCH_CHECK(blocks < (int64_t)1 << 31, "sample_losses: more than 2^31 blocks of logits; split the batch");
  launch(kernel, (uint32_t)blocks, threads, current_stream(batch.logits.get_device_index()));
  check_launches();
}

std::tuple<Tensor, Tensor, Tensor> sample_losses(Tensor logits, Tensor labels, int64_t ignore_index) {
  const DeviceGuard guard(logits.get_device_index());
  const LabelledLogits batch(logits, labels);
  Tensor losses = batch.empty({batch.rows}), norms = batch.empty({batch.rows});
  Tensor state = batch.empty({batch.rows, kState});
  dispatch(batch, [&](auto element, auto threads) {
    using T = decltype(element);
    const SampleLosses<T, threads()> kernel{(const T*)batch.logits.const_data_ptr(),
                                            batch.stride,
                                            batch.label(),
                                            (float*)losses.mutable_data_ptr(),
                                            (float*)norms.mutable_data_ptr(),
                                            (float*)state.mutable_data_ptr(),
                                            batch.classes,
                                            ignore_index};
    start(kernel, batch.rows, threads(), batch);
  });
  return {losses, norms, state};
}

Tensor sample_losses_backward(Tensor grad, Tensor logits, Tensor labels, Tensor state, int64_t ignore_index) {
  const DeviceGuard guard(logits.get_device_index());
  const LabelledLogits batch(logits, labels);
  state = batch.checked(grad, state);
  Tensor out = torch::stable::new_empty(batch.logits, {batch.rows, batch.classes});
  dispatch(batch, [&](auto element, auto threads) {
    using T = decltype(element);
    using Kernel = SampleLossesBackward<T, threads()>;
    const int64_t pieces = (batch.classes + Kernel::kPiece - 1) / Kernel::kPiece;
    const Kernel kernel{(const float*)grad.const_data_ptr(),
                        grad.stride(0),
                        (const T*)batch.logits.const_data_ptr(),
                        batch.stride,
                        batch.label(),
                        (const float*)state.const_data_ptr(),
                        (T*)out.mutable_data_ptr(),
                        batch.classes,
                        ignore_index,
                        (uint32_t)pieces};
    start(kernel, batch.rows * pieces, threads(), batch);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(samplewise, CUDA, m) {
  m.impl("sample_losses", TORCH_BOX(&sample_losses));
  m.impl("sample_losses_backward", TORCH_BOX(&sample_losses_backward));
}

}  // namespace samplewise
