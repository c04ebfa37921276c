// What the CPU and the CUDA kernels share: scalar functions that g++ and nvcc compile to the same bits. cuda_ext/ops.py
// says what each op computes, cuda_ext/reference.py computes it for whole arrays with the same operations.
//
//     elementary.h                 log and exp, bit for bit the same everywhere
//     core.h, losses.h             scalar functions of the ops, and of sample_losses
//     cpu.cpp, cpu_losses.cpp      kernels for the CPU and their registration
//     phases.h                     how a CUDA kernel is written, so that a test can run it on the CPU
//     cuda_kernels.h, cuda_draw.h, cuda_losses.h      the CUDA kernels
//     cuda.cu, cuda_losses.cu      their launches and registration; stream.h: where they run
//     losses_tensors.h             how sample_losses takes its arguments, on either
#pragma once
#include <cmath>

#include "elementary.h"

namespace samplewise {

// A one-dimensional tensor, its elements at any distance.
template <class T>
struct Strided {
  const T* data;
  int64_t stride;
  SW_HD T operator[](uint64_t i) const { return data[(int64_t)i * stride]; }
};

// --- hashing ---------------------------------------------------------------------------------------------------------

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;

SW_HD uint64_t mix64(uint64_t value) {
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9u;
  value = (value ^ (value >> 27)) * 0x94D049BB133111EBu;
  return value ^ (value >> 31);
}

// key is mix64(seed)
SW_HD uint64_t hash64(uint64_t value, uint64_t key) { return mix64(key + (value + 1) * kGolden); }

// --- ledger_update ---------------------------------------------------------------------------------------------------

struct alignas(16) Record {
  float loss_last, loss_ema, loss_mean, loss_m2;
  uint32_t count;
  int32_t last_step;
  float weight, score;
};

enum Counter { kRejected, kOutOfRange, kUpdates };

constexpr float kLossLimit = 1e18f;

SW_HD bool is_accepted(float loss) { return loss <= kLossLimit && loss >= -kLossLimit; }  // false for NaN

SW_HD bool is_finite(float value) { return (bits_of(value) & 0x7f800000u) != 0x7f800000u; }

// rate is 1 - ema; a score that is not finite changes nothing
SW_HD void add_loss(Record& record, float loss, float score, int32_t step, float rate) {
  const bool first = record.count == 0;
  record.count += 1;
  const float delta = loss - record.loss_mean;
  record.loss_mean = record.loss_mean + delta / (float)(int32_t)record.count;
  record.loss_m2 = record.loss_m2 + delta * (loss - record.loss_mean);
  record.loss_ema = first ? loss : record.loss_ema + rate * (loss - record.loss_ema);
  record.loss_last = loss;
  record.last_step = step;
  if (is_finite(score)) record.score = score;
  else if (first) record.score = float_of(0x7fc00000u);
}

// --- permutation -----------------------------------------------------------------------------------------------------

constexpr int64_t kSortedLimit = 65536;  // up to here sorted keys, above a Feistel network
constexpr int kRounds = 8;

// Sorting these 64-bit keys orders the elements: 48 bits of hash, then the element, so that no two are equal.
SW_HD uint64_t sort_key(uint64_t element, uint64_t key) { return (hash64(element, key) & ~0xffffull) | element; }

// A network on pairs (x, y) with x < rows, y < columns, both at most 2^16; the pair stands for x * columns + y.
struct Feistel {
  uint32_t n, rows, columns;
  uint32_t inner[kRounds], outer[kRounds];  // round keys
  double scale;                             // 1 / columns
};

inline Feistel make_feistel(uint32_t n, uint64_t seed) {
  Feistel net;
  net.n = n;
  net.rows = (uint32_t)std::sqrt((double)n);
  while ((uint64_t)net.rows * net.rows < n) ++net.rows;  // ceil(sqrt(n))
  net.columns = (n + net.rows - 1) / net.rows;
  net.scale = 1.0 / net.columns;
  const uint64_t key = mix64(seed);
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t bits = hash64(round, key);
    net.inner[round] = (uint32_t)bits;
    net.outer[round] = (uint32_t)(bits >> 32);
  }
  return net;
}

// (left + F(right)) mod modulus, F a keyed hash scaled into [0, modulus)
SW_HD uint32_t shift_by(uint32_t left, uint32_t right, uint32_t modulus, uint32_t inner, uint32_t outer) {
  uint32_t mixed = (right ^ inner) * 0x9E3779B1u;
  mixed = ((mixed ^ (mixed >> 15)) ^ outer) * 0x85EBCA77u;
  const uint32_t moved = left + (uint32_t)(((uint64_t)mixed * modulus) >> 32);
  return moved >= modulus ? moved - modulus : moved;
}

// One pass through the network: a permutation of [0, rows * columns).
SW_HD uint32_t pass_through(const Feistel& net, uint32_t value) {
  uint32_t x = (uint32_t)(((double)value + 0.5) * net.scale);  // value / columns, exactly, without a division
  uint32_t y = value - x * net.columns;
  for (int round = 0; round < kRounds; round += 2) {
    x = shift_by(x, y, net.rows, net.inner[round], net.outer[round]);
    y = shift_by(y, x, net.columns, net.inner[round + 1], net.outer[round + 1]);
  }
  return x * net.columns + y;
}

// The element at a position: values beyond the end are sent through again.
SW_HD uint32_t permuted(const Feistel& net, uint32_t position) {
  uint32_t value = pass_through(net, position);
  while (value >= net.n) value = pass_through(net, value);
  return value;
}

// --- draw ------------------------------------------------------------------------------------------------------------

constexpr uint32_t kInfinity = 0x7f800000u;
constexpr float kTwoToMinus31 = 4.656612873077393e-10f;
constexpr float kTwoToMinus32 = 2.3283064365386963e-10f;

// Standard exponential variate of 63 bits: relative precision 2^-24 at both ends, never 0.
SW_HD float exponential(uint64_t hash) {
  const float high = (float)(int32_t)((hash >> 32) & 0x7fffffffu);
  const float low = (float)(int32_t)((uint32_t)hash >> 1);
  const float v = (high + (low + 0.5f) * kTwoToMinus31) * kTwoToMinus32;  // uniform in (0, 1/2]
  const bool upper = (hash >> 63) != 0;                                   // the variate is -log v, or -log(1 - v)
  const float x = upper ? v : 1.0f - v;
  const float lost = upper ? 0.0f : (1.0f - x) - v;  // what rounding took from 1 - v
  return -(log_positive(x) + lost / x);
}

// Order-preserving key: the bits of variate / weight; infinity where the weight is not positive.
SW_HD uint32_t draw_key(uint64_t id, float weight, uint64_t key) {
  const float ratio = exponential(hash64(id, key)) / weight;
  return weight > 0.0f ? bits_of(ratio) : kInfinity;
}

// --- histogram -------------------------------------------------------------------------------------------------------

// How many values a bin holds, and the sum of their keys' offsets from its first.
struct Bin {
  uint64_t count, offset;
};

// Integers in the order of the floats; -0 counts as 0.
SW_HD uint32_t order_key(float value) {
  const uint32_t bits = bits_of(value + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

}  // namespace samplewise
