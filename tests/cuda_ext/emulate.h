// Runs a kernel of csrc/phases.h on the CPU: the threads of a phase in random order, the blocks in several CPU threads.
#pragma once
#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "phases.h"

namespace samplewise {

template <int phase, class Kernel, class Random>
void emulate_phases(const Kernel& kernel, uint32_t block, std::vector<uint32_t>& threads,
                    typename Kernel::Shared& shared, Random& random) {
  if constexpr (phase < Kernel::kPhases) {
    std::shuffle(threads.begin(), threads.end(), random);
    for (uint32_t thread : threads) kernel.template run<phase>(block, thread, shared);
    emulate_phases<phase + 1>(kernel, block, threads, shared, random);
  }
}

template <class Kernel>
void emulate(const Kernel& kernel, uint32_t blocks, uint32_t threads, uint64_t seed, int workers = 4) {
  std::vector<uint32_t> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), std::mt19937_64(seed));
  std::vector<std::thread> team;
  for (int worker = 0; worker < workers; ++worker) {
    team.emplace_back([&, worker] {
      std::mt19937_64 random(seed + 1 + worker);
      std::vector<uint32_t> lanes(threads);
      std::iota(lanes.begin(), lanes.end(), 0u);
      for (uint32_t i = worker; i < blocks; i += workers) {
        auto shared = std::make_unique<typename Kernel::Shared>();
        memset(static_cast<void*>(shared.get()), 0xCB, sizeof *shared);  // on a GPU it starts with anything
        emulate_phases<0>(kernel, order[i], lanes, *shared, random);
      }
    });
  }
  for (auto& member : team) member.join();
}

}  // namespace samplewise
