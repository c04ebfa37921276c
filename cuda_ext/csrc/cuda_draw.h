// The CUDA kernels of draw. A radix select finds the key of rank k, the bound; a last pass writes the items with keys
// below it, and as many of those at it as are missing, in the order of their ids. Only integers are added up, so that
// the order does not matter and every run gives the same.
#pragma once
#include "cuda_kernels.h"

namespace samplewise {

constexpr int kSelectRounds = 3;
constexpr int kRoundBits = 10;  // of a key's 31 that a round counts by, but the first, which takes 11
constexpr uint32_t kDigits = 2 << kRoundBits;

struct DrawState {
  uint64_t rank;   // of the item looked for, among those with the same leading bits
  uint32_t bound;  // the leading bits of its key; after the last round all of them
  uint64_t counts[kSelectRounds][kDigits];
};

// How many items lie below the bound and at it.
template <class T>
struct alignas(2 * sizeof(T)) Split {
  T below, equal;
  SW_HD Split operator+(Split other) const { return {below + other.below, equal + other.equal}; }
  // How many of them are drawn, where `missing` of those at the bound are.
  SW_HD T drawn(T missing) const { return below + (equal < missing ? equal : missing); }
};

// For each thread the sum of what the threads before it put. After put comes a barrier and sum_rows, which all call,
// then a barrier and sum_totals, which one calls, then a barrier.
template <class T>
struct SumBefore {
  static constexpr uint32_t kRow = 32, kRows = kThreads / kRow;
  T rows[kRows][kRow + 1];  // one more than is used, so that threads with a row each meet different banks
  T totals[kRows];

  SW_HD void put(uint32_t thread, T value) { rows[thread / kRow][thread % kRow] = value; }
  SW_HD void sum_rows(uint32_t thread) {
    if (thread < kRows) totals[thread] = sum_up(rows[thread], kRow);
  }
  SW_HD T sum_totals() { return sum_up(totals, kRows); }  // the sum of all
  SW_HD T operator[](uint32_t thread) const { return totals[thread / kRow] + rows[thread / kRow][thread % kRow]; }

  // Replace each value by the sum of those before it.
  static SW_HD T sum_up(T* values, uint32_t length) {
    T sum{};
    for (uint32_t i = 0; i < length; ++i) {
      const T here = values[i];
      values[i] = sum;
      sum = sum + here;
    }
    return sum;
  }
};

// --- the select ------------------------------------------------------------------------------------------------------

struct Begin {
  DrawState* state;
  uint64_t rank;

  using Shared = Nothing;
  static constexpr int kPhases = 1;
  template <int phase>
  SW_HD void run(uint32_t block, uint32_t thread, Nothing&) const {
    const uint64_t i = index_of(block, thread);
    if (i < kSelectRounds * kDigits) state->counts[i / kDigits][i % kDigits] = 0;
    if (i != 0) return;
    state->rank = rank;
    state->bound = 0;
  }
};

constexpr uint32_t kNoKey = ~0u;  // above all keys

struct StoredKeys {
  const uint32_t* keys;
  SW_HD uint32_t operator[](uint64_t i) const { return keys[i]; }
};

struct NewKeys {
  const float* weights;
  uint64_t key;
  uint32_t* keys;  // where they are stored
  SW_HD uint32_t operator[](uint64_t i) const { return keys[i] = draw_key(i, weights[i], key); }
};

// A thread's keys of a tile; all are read before it works on the first, so that it waits for memory once.
template <class Keys>
SW_HD void read_tile(uint32_t (&own)[kItems], const Keys& keys, uint64_t count, uint32_t block, uint32_t thread) {
  for (uint32_t item = 0; item < kItems; ++item) {
    const uint64_t i = (uint64_t)block * kTile + item * kThreads + thread;
    own[item] = i < count ? keys[i] : kNoKey;
  }
}

// Count the keys with the leading bits found so far by the bits that follow.
template <class Keys>
struct CountDigits {
  Keys keys;
  uint64_t count;
  DrawState* state;
  int round;

  struct Shared {
    uint32_t counts[kDigits];
  };
  static constexpr int kPhases = 3;
  template <int phase>
  SW_HD void run(uint32_t block, uint32_t thread, Shared& shared) const {
    if constexpr (phase == 0) {
      for (uint32_t i = thread; i < kDigits; i += kThreads) shared.counts[i] = 0;
    } else if constexpr (phase == 1) {
      const uint32_t first = state->bound << kRoundBits, digits = round == 0 ? kDigits : kDigits / 2;
      const int shift = (kSelectRounds - 1 - round) * kRoundBits;
      uint32_t own[kItems];
      read_tile(own, keys, count, block, thread);
      for (uint32_t key : own) {
        const uint32_t digit = (key >> shift) - first;  // huge where the leading bits are less
        if (digit < digits) atomic_add(&shared.counts[digit], 1u);
      }
    } else {
      for (uint32_t i = thread; i < kDigits; i += kThreads)
        if (shared.counts[i]) atomic_add(&state->counts[round][i], (uint64_t)shared.counts[i]);
    }
  }
};

// Find the digit that the item looked for has; one block.
struct SelectDigit {
  static constexpr uint32_t kOwn = kDigits / kThreads;

  DrawState* state;
  int round;

  struct Shared {
    uint64_t rank;
    uint32_t bound;
    SumBefore<uint64_t> below;
  };
  static constexpr int kPhases = 4;
  template <int phase>
  SW_HD void run(uint32_t, uint32_t thread, Shared& shared) const {
    const uint64_t* counts = &state->counts[round][thread * kOwn];
    if constexpr (phase == 0) {
      if (thread == 0) {
        shared.rank = state->rank;
        shared.bound = state->bound;
      }
      uint64_t sum = 0;
      for (uint32_t i = 0; i < kOwn; ++i) sum += counts[i];
      shared.below.put(thread, sum);
    } else if constexpr (phase == 1) {
      shared.below.sum_rows(thread);
    } else if constexpr (phase == 2) {
      if (thread == 0) shared.below.sum_totals();
    } else {
      uint64_t below = shared.below[thread];
      for (uint32_t i = 0; i < kOwn; ++i) {
        if (below <= shared.rank && shared.rank - below < counts[i]) {
          state->rank = shared.rank - below;
          state->bound = (shared.bound << kRoundBits) + thread * kOwn + i;
        }
        below += counts[i];
      }
    }
  }
};

// --- the items drawn -------------------------------------------------------------------------------------------------

struct CountTiles {
  StoredKeys keys;
  uint64_t count;
  const DrawState* state;
  Split<uint64_t>* tiles;

  struct Shared {
    SumBefore<Split<uint32_t>> before;
  };
  static constexpr int kPhases = 3;
  template <int phase>
  SW_HD void run(uint32_t block, uint32_t thread, Shared& shared) const {
    if constexpr (phase == 0) {
      const uint32_t bound = state->bound;
      uint32_t own[kItems];
      read_tile(own, keys, count, block, thread);
      Split<uint32_t> sum{};
      for (uint32_t key : own) sum = sum + Split<uint32_t>{key < bound, key == bound};
      shared.before.put(thread, sum);
    } else if constexpr (phase == 1) {
      shared.before.sum_rows(thread);
    } else if (thread == 0) {
      const Split<uint32_t> sum = shared.before.sum_totals();
      tiles[block] = {sum.below, sum.equal};
    }
  }
};

// Replace each tile's counts by those of all tiles before it; one block.
struct SumTiles {
  Split<uint64_t>* tiles;
  uint32_t count;
  const DrawState* state;
  float* tau;

  struct Shared {
    SumBefore<Split<uint64_t>> before;
  };
  static constexpr int kPhases = 4;
  template <int phase>
  SW_HD void run(uint32_t, uint32_t thread, Shared& shared) const {
    const uint32_t share = (count + kThreads - 1) / kThreads;
    const uint32_t first = thread * share, end = first + share < count ? first + share : count;
    if constexpr (phase == 0) {
      Split<uint64_t> sum{};
      for (uint32_t i = first; i < end; ++i) sum = sum + tiles[i];
      shared.before.put(thread, sum);
    } else if constexpr (phase == 1) {
      shared.before.sum_rows(thread);
    } else if constexpr (phase == 2) {
      if (thread == 0) shared.before.sum_totals();
    } else {
      Split<uint64_t> sum = shared.before[thread];
      for (uint32_t i = first; i < end; ++i) {
        const Split<uint64_t> here = tiles[i];
        tiles[i] = sum;
        sum = sum + here;
      }
      if (thread == 0) *tau = float_of(state->bound);
    }
  }
};

// A block writes what is drawn of its tile. In memory neighbouring threads read and write neighbouring places; between,
// in shared memory, each thread takes kItems neighbours, so that the sums run in the order of the ids.
struct WriteDrawn {
  enum Kind : uint8_t { kAbove, kBelow, kEqual };

  StoredKeys keys;
  uint64_t count;
  const DrawState* state;
  const Split<uint64_t>* tiles;
  int64_t* out;

  struct Shared {
    SumBefore<Split<uint32_t>> before;
    uint8_t kinds[kTile];
    uint16_t drawn[kTile];
    uint32_t length;  // of drawn
  };
  static constexpr int kPhases = 6;
  template <int phase>
  SW_HD void run(uint32_t block, uint32_t thread, Shared& shared) const {
    if constexpr (phase == 0) {
      const uint32_t bound = state->bound;
      uint32_t own[kItems];
      read_tile(own, keys, count, block, thread);
      for (uint32_t item = 0; item < kItems; ++item)
        shared.kinds[item * kThreads + thread] = own[item] < bound ? kBelow : own[item] == bound ? kEqual : kAbove;
    } else if constexpr (phase == 1) {
      Split<uint32_t> own{};
      for (uint32_t i = 0; i < kItems; ++i) own = own + split(shared.kinds[thread * kItems + i]);
      shared.before.put(thread, own);
    } else if constexpr (phase == 2) {
      shared.before.sum_rows(thread);
    } else if constexpr (phase == 3) {
      if (thread == 0) shared.length = shared.before.sum_totals().drawn(missing(block));
    } else if constexpr (phase == 4) {
      const uint32_t left = missing(block);
      Split<uint32_t> before = shared.before[thread];
      for (uint32_t i = thread * kItems; i < (thread + 1) * kItems; ++i) {
        const Split<uint32_t> after = before + split(shared.kinds[i]);
        if (after.drawn(left) > before.drawn(left)) shared.drawn[before.drawn(left)] = (uint16_t)i;
        before = after;
      }
    } else {
      const uint64_t begin = (uint64_t)block * kTile, first = tiles[block].drawn(state->rank);
      for (uint32_t i = thread; i < shared.length; i += kThreads) out[first + i] = begin + shared.drawn[i];
    }
  }

  static SW_HD Split<uint32_t> split(uint8_t kind) { return {kind == kBelow, kind == kEqual}; }

  // How many items at the bound the tiles before this one left over, as far as it could draw them.
  SW_HD uint32_t missing(uint32_t block) const {
    const uint64_t left = state->rank - (tiles[block].equal < state->rank ? tiles[block].equal : state->rank);
    return left < kTile ? (uint32_t)left : kTile;
  }
};

// keys: memory for `count` of them; tiles: for one Split of each kTile of them.
template <class Queue>
void launch_draw(int64_t* out, uint64_t k, float* tau, const float* weights, uint64_t count, uint64_t seed,
                 DrawState* state, uint32_t* keys, Split<uint64_t>* tiles, const Queue& queue) {
  const uint32_t blocks = blocks_for(count, kTile);
  queue(Begin{state, k}, blocks_for(kSelectRounds * kDigits), kThreads);
  queue(CountDigits<NewKeys>{{weights, mix64(seed), keys}, count, state, 0}, blocks, kThreads);
  queue(SelectDigit{state, 0}, 1, kThreads);
  for (int round = 1; round < kSelectRounds; ++round) {
    queue(CountDigits<StoredKeys>{{keys}, count, state, round}, blocks, kThreads);
    queue(SelectDigit{state, round}, 1, kThreads);
  }
  queue(CountTiles{{keys}, count, state, tiles}, blocks, kThreads);
  queue(SumTiles{tiles, blocks, state, tau}, 1, kThreads);
  queue(WriteDrawn{{keys}, count, state, tiles, out}, blocks, kThreads);
}

}  // namespace samplewise
