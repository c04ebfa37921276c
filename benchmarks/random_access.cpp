// The machine's limit for a ledger: read, change and write one 32-byte record an id, in batches.
#include <cstdint>

struct alignas(32) Record {
  uint32_t words[8];
};

// Fetched into the second-level cache, which takes more requests at once than the first, and from there into the first.
constexpr int64_t kFar = 64, kNear = 16;  // ids ahead

extern "C" void add_one(Record* records, const int64_t* ids, int64_t count, int64_t batch) {
  for (int64_t first = 0; first < count; first += batch) {
    const int64_t stop = first + batch < count ? first + batch : count;
    for (int64_t i = first; i < stop; ++i) {
      if (i + kFar < stop) __builtin_prefetch(&records[ids[i + kFar]], 1, 2);
      if (i + kNear < stop) __builtin_prefetch(&records[ids[i + kNear]], 1, 3);
      for (uint32_t& word : records[ids[i]].words) word += 1;
    }
  }
}
