// How a kernel is written so that it runs on a GPU and, without one, in a test on the CPU.
//
// A kernel is a struct that holds its arguments, with
//
//     struct Shared { ... };                               // memory that a block's threads share; may be empty
//     static constexpr int kPhases = 2;
//     template <int phase> SW_HD void run(uint32_t block, uint32_t thread, Shared& shared) const;
//
// A phase is what a thread does between two barriers: it reads nothing that another thread writes in the same phase,
// but through the atomics below. Local variables do not outlive a phase. launch() runs it on a GPU; emulate(), for
// tests, runs the threads of each phase in random order, and the blocks at once in several CPU threads.
#pragma once
#include "elementary.h"

namespace samplewise {

SW_HD uint32_t atomic_load(const uint32_t* where) {
#ifdef __CUDA_ARCH__
  return *(const volatile uint32_t*)where;
#else
  return __atomic_load_n(where, __ATOMIC_RELAXED);
#endif
}

SW_HD void atomic_store(uint32_t* where, uint32_t value) {
#ifdef __CUDA_ARCH__
  *(volatile uint32_t*)where = value;
#else
  __atomic_store_n(where, value, __ATOMIC_RELAXED);
#endif
}

// These give what stood there before.
SW_HD uint32_t atomic_exchange(uint32_t* where, uint32_t value) {
#ifdef __CUDA_ARCH__
  return atomicExch(where, value);
#else
  return __atomic_exchange_n(where, value, __ATOMIC_RELAXED);
#endif
}

SW_HD uint32_t atomic_add(uint32_t* where, uint32_t value) {
#ifdef __CUDA_ARCH__
  return atomicAdd(where, value);
#else
  return __atomic_fetch_add(where, value, __ATOMIC_RELAXED);
#endif
}

SW_HD uint64_t atomic_add(uint64_t* where, uint64_t value) {
#ifdef __CUDA_ARCH__
  return atomicAdd((unsigned long long*)where, (unsigned long long)value);
#else
  return __atomic_fetch_add(where, value, __ATOMIC_RELAXED);
#endif
}

#ifdef __CUDACC__

template <int phase, class Kernel>
__device__ __forceinline__ void run_phases(const Kernel& kernel, typename Kernel::Shared& shared) {
  if constexpr (phase < Kernel::kPhases) {
    if constexpr (phase > 0) __syncthreads();
    kernel.template run<phase>(blockIdx.x, threadIdx.x, shared);
    run_phases<phase + 1>(kernel, shared);
  }
}

template <class Kernel>
__global__ void kernel_of(const __grid_constant__ Kernel kernel) {
  __shared__ typename Kernel::Shared shared;
  run_phases<0>(kernel, shared);
}

template <class Kernel>
void launch(const Kernel& kernel, uint32_t blocks, uint32_t threads, void* stream) {
  kernel_of<<<blocks, threads, 0, (cudaStream_t)stream>>>(kernel);
}

#endif

}  // namespace samplewise
