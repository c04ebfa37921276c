// The CPU kernels. What they compute: cuda_ext/ops.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "core.h"

namespace samplewise {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 1 << 18;  // fewer elements than this are not worth a second thread
constexpr int64_t kBlock = 1024;     // elements worked on at a time, in the first-level cache

// Scratch memory, not initialised, of huge pages where the system gives them to who asks: half the time at 1e7 elements.
template <class T>
std::unique_ptr<T[], decltype(&std::free)> scratch(int64_t length) {
  constexpr size_t kHugePage = 1 << 21;
  const size_t bytes = (length * sizeof(T) + kHugePage - 1) / kHugePage * kHugePage;
  void* memory = std::aligned_alloc(kHugePage, bytes);
  if (!memory) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  madvise(memory, bytes, MADV_HUGEPAGE);
#endif
  return {(T*)memory, &std::free};
}

// Anything else would read or write memory that is not the tensor's. The public functions say what is wrong in words.
void expect(const char* name, const Tensor& tensor, ScalarType type, int64_t dim, int64_t length = -1) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == type && tensor.dim() == dim &&
                      (length < 0 || tensor.size(0) == length),
                  name, ": wrong device, dtype or shape");
}

void expect_dense(const char* name, const Tensor& tensor, ScalarType type, int64_t dim) {
  expect(name, tensor, type, dim);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": must be contiguous");
}

// --- ledger_update ---------------------------------------------------------------------------------------------------

// Entries ahead whose records are fetched: far, into the second-level cache, and again near, into the first, which can
// have only a few fetches from memory under way. Half the time of one distance.
constexpr int64_t kFar = 64, kNear = 8;

template <class T>
Strided<T> strided(const Tensor& tensor) {
  return {(const T*)tensor.data_ptr(), tensor.stride(0)};
}

// Gives the number of losses that were rejected. The arguments are anything with an index.
template <class Ids, class Losses, class Scores, class Steps>
int64_t add_losses(Record* rows, int64_t batch, Ids ids, Losses losses, Scores scores, Steps steps, float rate) {
  int64_t rejected = 0;
  for (int64_t i = 0; i < batch; ++i) {
    if (i + kFar < batch) __builtin_prefetch(&rows[ids[i + kFar]], 1, 2);
    if (i + kNear < batch) __builtin_prefetch(&rows[ids[i + kNear]], 1, 3);
    if (is_accepted(losses[i]))
      add_loss(rows[ids[i]], losses[i], scores[i], (int32_t)steps[i], rate);
    else
      ++rejected;
  }
  return rejected;
}

template <class T>
struct Always {
  T value;
  T operator[](int64_t) const { return value; }
};

void ledger_update(Tensor records, Tensor counters, Tensor links, Tensor ids, Tensor losses,
                   std::optional<Tensor> scores, std::optional<Tensor> steps, double ema) {
  (void)links;  // the CUDA kernel's
  const int64_t batch = ids.numel();
  expect_dense("records", records, ScalarType::Float, 2);
  STD_TORCH_CHECK(records.size(1) == 8, "records: must have 8 columns");
  expect_dense("counters", counters, ScalarType::Long, 1);
  STD_TORCH_CHECK(counters.numel() == 3, "counters: must be 3");
  expect("ids", ids, ScalarType::Long, 1);
  expect("losses", losses, ScalarType::Float, 1, batch);
  if (scores) expect("scores", *scores, ScalarType::Float, 1, batch);
  if (steps) expect("steps", *steps, ScalarType::Long, 1, batch);
  Record* rows = (Record*)records.data_ptr();
  int64_t* count = (int64_t*)counters.data_ptr();
  const uint64_t size = records.size(0);
  const auto id = strided<int64_t>(ids);
  const auto loss = strided<float>(losses);
  for (int64_t i = 0; i < batch; ++i)
    STD_TORCH_CHECK((uint64_t)id[i] < size, "ids: id ", id[i], " is outside [0, ", size, ")");
  const int64_t now = count[kUpdates];
  const float rate = (float)(1 - ema), none = std::nanf("");
  if (!scores && !steps && id.stride == 1 && loss.stride == 1) {  // the usual case, a tenth faster
    count[kRejected] += add_losses(rows, batch, id.data, loss.data, Always<float>{none}, Always<int64_t>{now}, rate);
  } else {
    const auto score = scores ? strided<float>(*scores) : Strided<float>{&none, 0};
    const auto step = steps ? strided<int64_t>(*steps) : Strided<int64_t>{&now, 0};
    count[kRejected] += add_losses(rows, batch, id, loss, score, step, rate);
  }
  if (!steps) count[kUpdates] += 1;
}

// --- permutation -----------------------------------------------------------------------------------------------------

void sorted_permutation(int64_t* out, int64_t length, int64_t n, uint64_t seed, int64_t start, int64_t stride) {
  std::vector<uint64_t> keys(n);
  const uint64_t key = mix64(seed);
  for (int64_t i = 0; i < n; ++i) keys[i] = sort_key(i, key);
  std::sort(keys.begin(), keys.end());
  for (int64_t i = 0; i < length; ++i) out[i] = keys[start + i * stride] & 0xffff;
}

SW_CLONES void feistel_block(const Feistel& net, int64_t* out, int64_t count, uint32_t start, uint32_t stride) {
  for (int64_t i = 0; i < count; ++i) out[i] = pass_through(net, start + (uint32_t)i * stride);
}

void permutation(Tensor out, int64_t n, int64_t seed, int64_t start, int64_t stride) {
  expect_dense("out", out, ScalarType::Long, 1);
  int64_t* to = (int64_t*)out.data_ptr();
  const int64_t length = out.numel();
  STD_TORCH_CHECK(n >= 1 && n <= INT64_C(1) << 31 && start >= 0 && stride >= 1 &&
                      (length == 0 || (start < n && length - 1 <= (n - 1 - start) / stride)),
                  "permutation: positions must lie in [0, n), n in [1, 2^31]");
  if (n <= kSortedLimit) return sorted_permutation(to, length, n, seed, start, stride);
  const Feistel net = make_feistel((uint32_t)n, seed);
  torch::stable::parallel_for(0, length, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kBlock) {
      const int64_t stop = std::min(first + kBlock, end);
      feistel_block(net, to + first, stop - first, (uint32_t)(start + first * stride), (uint32_t)stride);
      for (int64_t i = first; i < stop; ++i)
        while (to[i] >= n) to[i] = pass_through(net, (uint32_t)to[i]);
    }
  });
}

// --- draw ------------------------------------------------------------------------------------------------------------

constexpr int kDrawShift = 19, kDrawBins = 1 << 12;  // by the 12 leading bits of a key, whose sign bit is 0

SW_CLONES void key_block(uint32_t* keys, const float* weights, int64_t count, uint64_t first, uint64_t key) {
  for (int64_t i = 0; i < count; ++i) keys[i] = draw_key(first + i, weights[i], key);
}

void draw(Tensor out, Tensor tau, Tensor weights, int64_t seed) {
  expect_dense("out", out, ScalarType::Long, 1);
  expect_dense("tau", tau, ScalarType::Float, 1);
  expect_dense("weights", weights, ScalarType::Float, 1);
  int64_t* ids = (int64_t*)out.data_ptr();
  const float* weight = (const float*)weights.data_ptr();
  const int64_t n = weights.numel(), k = out.numel();
  STD_TORCH_CHECK(k < n && n <= INT64_C(1) << 31 && tau.numel() == 1, "draw: k is ", k, ", but must be less than ", n);
  const uint64_t key = mix64(seed);
  const auto memory = scratch<uint32_t>(n);
  uint32_t* keys = memory.get();
  std::vector<int64_t> histogram(kDrawBins);
  std::mutex merging;
  torch::stable::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> own(kDrawBins);
    for (int64_t first = begin; first < end; first += kBlock) {
      const int64_t stop = std::min(first + kBlock, end);
      key_block(&keys[first], weight + first, stop - first, first, key);
      for (int64_t i = first; i < stop; ++i) ++own[keys[i] >> kDrawShift];
    }
    std::lock_guard<std::mutex> lock(merging);
    for (int bin = 0; bin < kDrawBins; ++bin) histogram[bin] += own[bin];
  });
  int64_t below = 0;
  uint32_t bin = 0;
  while (below + histogram[bin] <= k) below += histogram[bin++];
  std::vector<uint64_t> candidates;  // of the bin with the item of rank k: key, then id
  candidates.reserve(histogram[bin]);
  for (int64_t i = 0; i < n; ++i)
    if (keys[i] >> kDrawShift == bin) candidates.push_back((uint64_t)keys[i] << 32 | (uint64_t)i);
  std::nth_element(candidates.begin(), candidates.begin() + (k - below), candidates.end());
  const uint32_t bound = candidates[k - below] >> 32, last = (uint32_t)candidates[k - below];
  int64_t taken = 0;
  for (int64_t i = 0; i < n && taken < k; ++i) {
    ids[taken] = i;
    taken += (keys[i] < bound) | ((keys[i] == bound) & ((uint32_t)i < last));
  }
  *(float*)tau.data_ptr() = float_of(bound);
}

// --- histogram -------------------------------------------------------------------------------------------------------

void histogram(Tensor bins, Tensor values, int64_t low, int64_t shift) {
  expect_dense("bins", bins, ScalarType::Long, 2);
  expect("values", values, ScalarType::Float, 1);
  STD_TORCH_CHECK(bins.size(1) == 2 && shift >= 0 && shift < 32, "histogram: bins must be (B, 2), shift in [0, 32)");
  Bin* to = (Bin*)bins.data_ptr();
  const auto value = strided<float>(values);
  const uint64_t size = bins.size(0);
  const uint32_t mask = (1u << shift) - 1;
  const int64_t n = values.numel();
  std::fill(to, to + size, Bin{0, 0});
  std::mutex merging;
  torch::stable::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {
    std::vector<Bin> local(begin == 0 && end == n ? 0 : size);
    Bin* own = local.empty() ? to : local.data();
    for (int64_t i = begin; i < end; ++i) {
      const float x = value[i];
      const uint64_t offset = (uint64_t)order_key(x) - (uint64_t)low;  // huge where x is below
      if ((offset >> shift) < size && is_finite(x)) {
        own[offset >> shift].count += 1;
        own[offset >> shift].offset += (uint32_t)offset & mask;
      }
    }
    if (own == to) return;
    std::lock_guard<std::mutex> lock(merging);
    for (uint64_t bin = 0; bin < size; ++bin) {
      to[bin].count += own[bin].count;
      to[bin].offset += own[bin].offset;
    }
  });
}

}  // namespace
}  // namespace samplewise

STABLE_TORCH_LIBRARY_IMPL(samplewise, CPU, m) {
  m.impl("ledger_update", TORCH_BOX(&samplewise::ledger_update));
  m.impl("permutation", TORCH_BOX(&samplewise::permutation));
  m.impl("draw", TORCH_BOX(&samplewise::draw));
  m.impl("histogram", TORCH_BOX(&samplewise::histogram));
}
