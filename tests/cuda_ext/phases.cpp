// The CUDA kernels of cuda_kernels.h and cuda_draw.h on the CPU, in the order in which cuda.cu launches them; for
// test_phases.py.
#include <algorithm>
#include <vector>

#include "cuda_draw.h"
#include "emulate.h"
#include "cuda_kernels.h"

using namespace samplewise;

namespace {

// Another seed gives another order of the threads and the blocks.
auto emulated(uint64_t seed) {
  return [seed](const auto& kernel, uint32_t blocks, uint32_t threads) { emulate(kernel, blocks, threads, seed); };
}

// Memory as new memory of a GPU is: anything may stand there.
template <class T>
std::vector<T> scratch(size_t length) {
  std::vector<T> memory(length);
  std::fill_n((unsigned char*)memory.data(), length * sizeof(T), 0xCB);
  return memory;
}

}  // namespace

extern "C" {

void ledger_update(uint64_t order, Record* records, uint64_t size, uint64_t* counters, uint32_t* links, uint64_t count,
                   Strided<int64_t> ids, Strided<float> losses, Strided<float> scores, Strided<int64_t> steps,
                   bool with_steps, double ema) {
  auto next = scratch<uint32_t>(count);
  const float rate = (float)(1 - ema);
  launch_ledger_update(
      {records, size, counters, links, next.data(), count, ids, losses, scores, steps, with_steps, rate},
      emulated(order));
}

void permutation(uint64_t order, int64_t* out, uint64_t length, uint32_t n, uint64_t seed, uint64_t start,
                 uint64_t stride) {
  const uint32_t sorted = n <= kSortedLimit ? n : 0;
  auto keys = scratch<uint64_t>(sorted);
  auto ranks = scratch<uint32_t>(sorted);
  launch_permutation(out, length, n, seed, start, stride, keys.data(), ranks.data(), emulated(order));
}

void draw(uint64_t order, int64_t* out, uint64_t k, float* tau, const float* weights, uint64_t count, uint64_t seed) {
  auto state = scratch<DrawState>(1);
  auto keys = scratch<uint32_t>(count);
  auto tiles = scratch<Split<uint64_t>>(blocks_for(count, kTile));
  launch_draw(out, k, tau, weights, count, seed, state.data(), keys.data(), tiles.data(), emulated(order));
}

void histogram(uint64_t order, Bin* bins, uint32_t size, Strided<float> values, uint64_t count, int64_t low,
               uint32_t shift) {
  launch_histogram(bins, size, values, count, low, shift, emulated(order));
}

}  // extern "C"
