// The CUDA kernels of ledger_update, permutation and histogram; cuda_draw.h has those of draw. cuda_ext/ops.py says
// what they compute, phases.h how a kernel is written. launch_...() hands an op's kernels, one after the other, to `queue`,
// called with a kernel, its blocks and the threads of each: cuda.cu puts them on a stream, a test runs them on the CPU.
#pragma once
#include <algorithm>

#include "core.h"
#include "phases.h"

namespace samplewise {

constexpr uint32_t kThreads = 512;  // of a block
constexpr uint32_t kItems = 16;     // of a thread
constexpr uint32_t kTile = kThreads * kItems;

struct Nothing {};  // what the threads of most kernels share

SW_HD uint64_t index_of(uint32_t block, uint32_t thread, uint32_t threads = kThreads) {
  return (uint64_t)block * threads + thread;
}

inline uint32_t blocks_for(uint64_t count, uint32_t each = kThreads) { return (uint32_t)((count + each - 1) / each); }

struct Zero {
  uint64_t* words;
  uint64_t count;

  using Shared = Nothing;
  static constexpr int kPhases = 1;
  template <int phase>
  SW_HD void run(uint32_t block, uint32_t thread, Nothing&) const {
    const uint64_t i = index_of(block, thread);
    if (i < count) words[i] = 0;
  }
};

// --- ledger_update ---------------------------------------------------------------------------------------------------

constexpr uint32_t kLedgerThreads = 128;  // few, so that a small batch reaches many multiprocessors

// A batch and the ledger that it goes to. The entries of an id form a list: links[id] is its head, next[i] what follows
// entry i, both counted from 1, with 0 for nothing. links is all zeros before and after.
struct Batch {
  static constexpr uint32_t kOutside = ~0u;  // in next: the id is outside [0, size)

  Record* records;
  uint64_t size;
  uint64_t* counters;
  uint32_t *links, *next;
  uint64_t count;
  Strided<int64_t> ids;
  Strided<float> losses, scores;  // scores have no data where there are none
  Strided<int64_t> steps;
  bool with_steps;
  float rate;  // 1 - ema
};

struct Link {
  Batch batch;

  using Shared = Nothing;
  static constexpr int kPhases = 1;
  template <int phase>
  SW_HD void run(uint32_t block, uint32_t thread, Nothing&) const {
    const uint64_t i = index_of(block, thread, kLedgerThreads);
    if (i == 0 && !batch.with_steps) batch.counters[kUpdates] += 1;  // which nobody reads before Apply
    if (i >= batch.count) return;
    const uint64_t id = (uint64_t)batch.ids[i];
    if (id < batch.size) {
      batch.next[i] = atomic_exchange(&batch.links[id], (uint32_t)i + 1);
    } else {
      batch.next[i] = Batch::kOutside;
      atomic_add(&batch.counters[kOutOfRange], (uint64_t)1);
    }
  }
};

// A few numbers in ascending order. No index depends on data, so that a GPU keeps them in registers.
struct Few {
  static constexpr int kMost = 8;
  static constexpr uint32_t kNone = ~0u;
  uint32_t values[kMost] = {kNone, kNone, kNone, kNone, kNone, kNone, kNone, kNone};

  SW_HD bool empty() const { return values[0] == kNone; }

  SW_HD void insert(uint32_t value) {
    for (int k = 0; k < kMost; ++k) {
      const uint32_t there = values[k];
      values[k] = value < there ? value : there;
      value = value < there ? there : value;
    }
  }

  SW_HD uint32_t pop() {
    const uint32_t smallest = values[0];
    for (int k = 1; k < kMost; ++k) values[k - 1] = values[k];
    values[kMost - 1] = kNone;
    return smallest;
  }
};

// The thread at the head of an id's list applies all its entries in batch order.
struct Apply {
  Batch batch;

  using Shared = Nothing;
  static constexpr int kPhases = 1;
  template <int phase>
  SW_HD void run(uint32_t block, uint32_t thread, Nothing&) const {
    const uint64_t i = index_of(block, thread, kLedgerThreads);
    if (i >= batch.count || batch.next[i] == Batch::kOutside) return;
    const int64_t id = batch.ids[i];
    if (atomic_load(&batch.links[id]) != (uint32_t)i + 1) return;
    Record record = batch.records[id];
    uint64_t rejected = 0;
    Few entries;
    uint32_t rest = (uint32_t)i + 1;
    for (int length = 0; rest && length < Few::kMost; ++length) {
      entries.insert(rest - 1);
      rest = batch.next[rest - 1];
    }
    if (rest == 0) {
      while (!entries.empty()) add(record, entries.pop(), rejected);
    } else {  // sorting a long list would take the square of its length, reading the batch never does
      for (uint64_t j = 0; j < batch.count; ++j)
        if (batch.ids[j] == id) add(record, j, rejected);
    }
    batch.records[id] = record;
    atomic_store(&batch.links[id], 0);
    if (rejected) atomic_add(&batch.counters[kRejected], rejected);
  }

  SW_HD void add(Record& record, uint64_t i, uint64_t& rejected) const {
    const float loss = batch.losses[i];
    const float score = batch.scores.data ? batch.scores[i] : float_of(0x7fc00000u);
    const int64_t step = batch.with_steps ? batch.steps[i] : (int64_t)batch.counters[kUpdates] - 1;
    if (is_accepted(loss))
      add_loss(record, loss, score, (int32_t)step, batch.rate);
    else
      ++rejected;
  }
};

template <class Queue>
void launch_ledger_update(const Batch& batch, const Queue& queue) {
  const uint32_t blocks = blocks_for(batch.count, kLedgerThreads);
  queue(Link{batch}, std::max(blocks, 1u), kLedgerThreads);  // an empty batch is an update too
  if (blocks) queue(Apply{batch}, blocks, kLedgerThreads);
}

// --- permutation -----------------------------------------------------------------------------------------------------

struct Permute {
  Feistel net;
  int64_t* out;
  uint64_t length, start, stride;

  using Shared = Nothing;
  static constexpr int kPhases = 1;
  template <int phase>
  SW_HD void run(uint32_t block, uint32_t thread, Nothing&) const {
    const uint64_t i = index_of(block, thread);
    if (i < length) out[i] = permuted(net, (uint32_t)(start + i * stride));
  }
};

struct MakeSortKeys {
  uint64_t* keys;
  uint32_t* ranks;
  uint32_t n;
  uint64_t key;

  using Shared = Nothing;
  static constexpr int kPhases = 1;
  template <int phase>
  SW_HD void run(uint32_t block, uint32_t thread, Nothing&) const {
    const uint32_t i = (uint32_t)index_of(block, thread);
    if (i >= n) return;
    keys[i] = sort_key(i, key);
    ranks[i] = 0;
  }
};

// Add to each element's rank how many keys of one tile lie below its own; a block takes kThreads elements and one tile.
struct Rank {
  static constexpr uint32_t kKeys = 4 * kThreads;

  const uint64_t* keys;
  uint32_t* ranks;
  uint32_t n, tiles;

  struct Shared {
    uint64_t tile[kKeys];
  };
  static constexpr int kPhases = 2;
  template <int phase>
  SW_HD void run(uint32_t block, uint32_t thread, Shared& shared) const {
    if constexpr (phase == 0) {
      const uint32_t first = block % tiles * kKeys;
      for (uint32_t j = thread; j < kKeys; j += kThreads) shared.tile[j] = first + j < n ? keys[first + j] : ~0ull;
    } else {
      const uint32_t i = (uint32_t)index_of(block / tiles, thread);
      if (i >= n) return;
      const uint64_t own = keys[i];
      uint32_t below = 0;
      for (uint32_t j = 0; j < kKeys; ++j) below += shared.tile[j] < own;
      atomic_add(&ranks[i], below);
    }
  }
};

struct WriteRanked {
  const uint32_t* ranks;
  uint32_t n;
  int64_t* out;
  uint64_t length, start, stride;

  using Shared = Nothing;
  static constexpr int kPhases = 1;
  template <int phase>
  SW_HD void run(uint32_t block, uint32_t thread, Nothing&) const {
    const uint32_t i = (uint32_t)index_of(block, thread);
    if (i >= n || ranks[i] < start) return;
    const uint64_t distance = ranks[i] - start;
    if (distance % stride == 0 && distance / stride < length) out[distance / stride] = i;
  }
};

// keys and ranks: memory for n each; needed only up to kSortedLimit.
template <class Queue>
void launch_permutation(int64_t* out, uint64_t length, uint32_t n, uint64_t seed, uint64_t start, uint64_t stride,
                        uint64_t* keys, uint32_t* ranks, const Queue& queue) {
  if (length == 0) return;
  if (n > kSortedLimit)
    return queue(Permute{make_feistel(n, seed), out, length, start, stride}, blocks_for(length), kThreads);
  const uint32_t blocks = blocks_for(n), tiles = blocks_for(n, Rank::kKeys);
  queue(MakeSortKeys{keys, ranks, n, mix64(seed)}, blocks, kThreads);
  queue(Rank{keys, ranks, n, tiles}, blocks * tiles, kThreads);
  queue(WriteRanked{ranks, n, out, length, start, stride}, blocks, kThreads);
}

// --- histogram -------------------------------------------------------------------------------------------------------

constexpr uint32_t kNoBin = ~0u;

// Values pile up in few bins, so that a warp, whose threads all come here at once, first adds up what goes to the same.
SW_HD void add_to_bin(Bin* bins, uint32_t bin, uint32_t offset) {
  uint64_t count = 1, sum = offset;
#ifdef __CUDA_ARCH__
  const uint32_t peers = __match_any_sync(~0u, bin);
  count = __popc(peers);
  if (count > 1)  // in two halves: 32 offsets could overflow 32 bits
    sum = ((uint64_t)__reduce_add_sync(peers, offset >> 16) << 16) + __reduce_add_sync(peers, offset & 0xffff);
  if (threadIdx.x % 32 != __ffs(peers) - 1) return;
#endif
  if (bin == kNoBin) return;
  atomic_add(&bins[bin].count, count);
  atomic_add(&bins[bin].offset, sum);
}

struct CountValues {
  Strided<float> values;
  uint64_t count;
  Bin* bins;
  uint32_t size;
  int64_t low;
  uint32_t shift;

  using Shared = Nothing;
  static constexpr int kPhases = 1;
  template <int phase>
  SW_HD void run(uint32_t block, uint32_t thread, Nothing&) const {
    const uint32_t mask = shift < 32 ? (1u << shift) - 1 : ~0u;
    float own[kItems];  // read before work on the first begins, so that a thread waits for memory once
    for (uint32_t item = 0; item < kItems; ++item) {
      const uint64_t i = (uint64_t)block * kTile + item * kThreads + thread;
      own[item] = i < count ? values[i] : float_of(kInfinity);  // which is not counted
    }
    for (float value : own) {
      const uint64_t offset = (uint64_t)order_key(value) - (uint64_t)low;  // huge where the value is below
      const bool counted = is_finite(value) && (offset >> shift) < size;
      add_to_bin(bins, counted ? (uint32_t)(offset >> shift) : kNoBin, (uint32_t)offset & mask);
    }
  }
};

template <class Queue>
void launch_histogram(Bin* bins, uint32_t size, Strided<float> values, uint64_t count, int64_t low, uint32_t shift,
                      const Queue& queue) {
  const uint64_t words = (uint64_t)size * 2;
  if (size) queue(Zero{&bins->count, words}, blocks_for(words), kThreads);
  if (size && count) queue(CountValues{values, count, bins, size, low, shift}, blocks_for(count, kTile), kThreads);
}

}  // namespace samplewise
