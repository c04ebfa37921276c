// The CUDA kernels' binding. What they compute: cuda_ext/ops.py. Arguments are checked where a wrong one would corrupt
// memory. Nothing waits for the GPU, and all memory comes from torch, so that a CUDA graph can capture every op.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "cuda_draw.h"
#include "cuda_kernels.h"
#include "stream.h"

namespace samplewise {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Takes kernels to the current stream of a tensor's device.
struct Queue {
  int32_t device;
  torch::stable::accelerator::DeviceGuard guard;
  void* stream;

  explicit Queue(const Tensor& tensor)
      : device(tensor.get_device_index()), guard(device), stream(current_stream(device)) {}

  template <class Kernel>
  void operator()(const Kernel& kernel, uint32_t blocks, uint32_t threads) const {
    launch(kernel, blocks, threads, stream);
    check_launches();
  }

  void check(const char* name, const Tensor& tensor, ScalarType type) const {
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device && tensor.scalar_type() == type,
                    "samplewise: ", name, " has another device or type than the op's schema says");
  }

  template <class T>
  T* contiguous(const char* name, const Tensor& tensor, ScalarType type, int64_t at_least) const {
    check(name, tensor, type);
    STD_TORCH_CHECK(tensor.is_contiguous() && tensor.numel() >= at_least, "samplewise: ", name,
                    " must be contiguous, with at least ", at_least, " elements");
    return (T*)tensor.data_ptr();
  }

  template <class T>
  Strided<T> strided(const char* name, const Tensor& tensor, ScalarType type, int64_t length) const {
    check(name, tensor, type);
    STD_TORCH_CHECK(tensor.dim() == 1 && tensor.numel() == length, "samplewise: ", name, " must have shape (", length,
                    ",)");
    return {(const T*)tensor.data_ptr(), tensor.stride(0)};
  }
};

Tensor scratch(const Tensor& like, int64_t length, ScalarType type) {
  return torch::stable::new_empty(like, {length}, type);
}

void ledger_update(Tensor records, Tensor counters, Tensor links, Tensor ids, Tensor losses,
                   std::optional<Tensor> scores, std::optional<Tensor> steps, double ema) {
  const Queue queue(records);
  const int64_t size = records.size(0), count = ids.numel();
  STD_TORCH_CHECK(count < INT32_MAX, "samplewise: ids: at most 2^31 - 2 entries fit in a batch");
  Tensor next = scratch(ids, count, ScalarType::Int);
  Batch batch{};
  batch.records = queue.contiguous<Record>("records", records, ScalarType::Float, size * 8);
  STD_TORCH_CHECK((uintptr_t)batch.records % alignof(Record) == 0, "samplewise: records must start at 16 bytes");
  batch.size = size;
  batch.counters = queue.contiguous<uint64_t>("counters", counters, ScalarType::Long, 3);
  batch.links = queue.contiguous<uint32_t>("links", links, ScalarType::Int, size);
  batch.next = (uint32_t*)next.data_ptr();
  batch.count = count;
  batch.ids = queue.strided<int64_t>("ids", ids, ScalarType::Long, count);
  batch.losses = queue.strided<float>("losses", losses, ScalarType::Float, count);
  if (scores) batch.scores = queue.strided<float>("scores", *scores, ScalarType::Float, count);
  if (steps) batch.steps = queue.strided<int64_t>("steps", *steps, ScalarType::Long, count);
  batch.with_steps = steps.has_value();
  batch.rate = (float)(1 - ema);
  launch_ledger_update(batch, queue);
}

void permutation(Tensor out, int64_t n, int64_t seed, int64_t start, int64_t stride) {
  const Queue queue(out);
  int64_t* to = queue.contiguous<int64_t>("out", out, ScalarType::Long, 0);
  STD_TORCH_CHECK(n >= 1 && n <= INT64_C(1) << 31 && start >= 0 && stride >= 1 &&
                      (out.numel() == 0 || (start < n && out.numel() - 1 <= (n - 1 - start) / stride)),
                  "permutation: positions must lie in [0, n), n in [1, 2^31]");
  const int64_t sorted = n <= kSortedLimit ? n : 0;
  Tensor keys = scratch(out, sorted, ScalarType::Long), ranks = scratch(out, sorted, ScalarType::Int);
  launch_permutation(to, out.numel(), (uint32_t)n, seed, start, stride, (uint64_t*)keys.data_ptr(),
                     (uint32_t*)ranks.data_ptr(), queue);
}

void draw(Tensor out, Tensor tau, Tensor weights, int64_t seed) {
  const Queue queue(out);
  const int64_t n = weights.numel(), k = out.numel();
  STD_TORCH_CHECK(k < n && n <= INT64_C(1) << 31, "draw: k is ", k, ", but must be less than ", n);
  int64_t* to = queue.contiguous<int64_t>("out", out, ScalarType::Long, k);
  float* bound = queue.contiguous<float>("tau", tau, ScalarType::Float, 1);
  const float* weight = queue.contiguous<float>("weights", weights, ScalarType::Float, n);
  Tensor state = scratch(out, sizeof(DrawState) / sizeof(int64_t), ScalarType::Long);
  Tensor keys = scratch(out, n, ScalarType::Int);
  Tensor tiles = scratch(out, (int64_t)blocks_for(n, kTile) * 2, ScalarType::Long);
  launch_draw(to, k, bound, weight, n, seed, (DrawState*)state.data_ptr(), (uint32_t*)keys.data_ptr(),
              (Split<uint64_t>*)tiles.data_ptr(), queue);
}

void histogram(Tensor bins, Tensor values, int64_t low, int64_t shift) {
  const Queue queue(bins);
  const int64_t size = bins.size(0), count = values.numel();
  STD_TORCH_CHECK(size < INT32_MAX && shift >= 0 && shift < 32, "histogram: shift must be in [0, 32)");
  Bin* to = queue.contiguous<Bin>("bins", bins, ScalarType::Long, size * 2);
  launch_histogram(to, (uint32_t)size, queue.strided<float>("values", values, ScalarType::Float, count), count, low,
                   (uint32_t)shift, queue);
}

}  // namespace
}  // namespace samplewise

STABLE_TORCH_LIBRARY_IMPL(samplewise, CUDA, m) {
  m.impl("ledger_update", TORCH_BOX(&samplewise::ledger_update));
  m.impl("permutation", TORCH_BOX(&samplewise::permutation));
  m.impl("draw", TORCH_BOX(&samplewise::draw));
  m.impl("histogram", TORCH_BOX(&samplewise::histogram));
}
