// The CUDA kernels of sample_losses run on the CPU, for ctypes: type 0 float, 1 bfloat16, 2 float16.
#include "emulate.h"
#include "cuda_losses.h"

using namespace samplewise;

template <class F>
static void dispatch(int type, int threads, F&& f) {
  const auto with_type = [&](auto element) {
    if (threads == 32) return f(element, std::integral_constant<int, 32>{});
    return f(element, std::integral_constant<int, 256>{});
  };
  if (type == 0) return with_type(float{});
  if (type == 1) return with_type(Bf16{});
  return with_type(Fp16{});
}

extern "C" void forward(int type, int threads, uint64_t seed, const void* logits, int64_t rows, int64_t classes,
                        int64_t stride, const int64_t* labels, int64_t ignored, float* losses, float* norms,
                        float* state) {
  dispatch(type, threads, [&](auto element, auto count) {
    using T = decltype(element);
    const SampleLosses<T, count()> kernel{(const T*)logits, stride, labels, losses, norms, state, classes, ignored};
    emulate(kernel, (uint32_t)rows, count(), seed);
  });
}

extern "C" void backward(int type, int threads, uint64_t seed, const float* grad, int64_t grad_stride,
                         const void* logits, int64_t rows, int64_t classes, int64_t stride, const int64_t* labels,
                         int64_t ignored, const float* state, void* out) {
  dispatch(type, threads, [&](auto element, auto count) {
    using T = decltype(element);
    using Kernel = SampleLossesBackward<T, count()>;
    const uint32_t pieces = (uint32_t)((classes + Kernel::kPiece - 1) / Kernel::kPiece);
    const Kernel kernel{grad,   grad_stride, (const T*)logits, stride,  labels,
                        state, (T*)out,     classes,          ignored, pieces};
    emulate(kernel, (uint32_t)rows * pieces, count(), seed);
  });
}
