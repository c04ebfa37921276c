// The loss of a row of logits z (V,) with label y, and the norm of its gradient with respect to them:
//
//     loss = log sum_j exp(z_j) - z_y        norm = ||softmax(z) - onehot(y)||
//
// from A = sum_{j != y} exp(z_j) and Q = sum_{j != y} exp(z_j)^2, without a difference of nearly equal numbers:
//
//     x = A / exp(z_y)     loss = log(1 + x)     1 - p_y = x / (1 + x)     norm = (1 - p_y) sqrt(1 + Q / A^2)
//
// Both sums are kept by 2048 lanes: class j belongs to lane j mod 2048, and a lane takes its classes in ascending
// order. Lane 8 t + e is lane e of thread t. The 8 lanes of each thread are added first; then thread t of 16 and threads
// t + 16, t + 32, ...; then the 16 that are left: each time brought to the largest scale among them and added in halves
// (the first of n to number n / 2 + 1 and so on). An empty lane changes nothing, so that few classes need few lanes. The
// order never depends on the machine: kernels on CPU and GPU and cuda_ext/losses.py give the same bits.
#pragma once
#include <cmath>

#include "phases.h"

namespace samplewise {

constexpr int kGroup = 8;      // lanes of a thread, classes that it loads at a time
constexpr int kLanes = 2048;
constexpr int kParts = 16;     // threads that are left for the last addition
constexpr float kFaint = 62;   // a term below 2^-62 of its lane's scale is left out: its square stays a normal number
constexpr float kSlack = 30;   // a lane's terms may exceed its scale by this power of two before it is scaled anew
constexpr float kLimit = 4096; // logits within +-kLimit are taken as they are; other rows again, less their maximum
constexpr float kLowest = -5850;  // first scale of a lane: terms of logits below about -4096 vanish against it

// Sums of a lane in units of 2^K and 4^K, with origin = kRounder - K as scaled_exp wants it.
struct Lane {
  float origin = kRounder - kLowest;
  float sum = 0;
  float squares = 0;
};

SW_HD float select(bool condition, float yes, float no) { return condition ? yes : no; }

// K of one lane less K of another.
SW_HD int32_t distance(float origin, float other) { return (int32_t)(bits_of(other) - bits_of(origin)); }

SW_HD Lane rescaled(const Lane& lane, float origin) {
  const float scale = power_of_two(distance(lane.origin, origin));
  return {origin, lane.sum * scale, lane.squares * scale * scale};
}

// As origin, the integer nearest to z / log 2.
SW_HD float origin_of(float z) { return kRounder - ((z * kLog2e + kRounder) - kRounder); }

// Place of exp(z) on a lane's scale, as scaled_exp has it.
SW_HD float placed(float z, float origin) { return z * kLog2e + origin; }

// Whether exp(z) is too large for the scale on which it is placed; true for NaN.
SW_HD bool outgrows(float place) { return !(place <= kRounder + kSlack); }

// The lane at the scale of exp(z). Its sum becomes NaN where z is NaN or above the limit.
SW_HD Lane raised(float z, const Lane& lane) {
  const Lane moved = rescaled(lane, origin_of(z));
  return {moved.origin, select(z <= kLimit, moved.sum, NAN), moved.squares};
}

SW_HD Lane added(float z, float place, const Lane& lane) {
  const float value = scaled_exp(z, place, lane.origin, kFaint);
  return {lane.origin, lane.sum + value, lane.squares + value * value};
}

// What is kept of a row. softmax(z)_j = exp(z_j - shift) / 2^K * inverse, with origin = kRounder - K.
struct Row {
  float loss, norm;
  float shift, origin, inverse, complement;  // complement = 1 - p_y
};
constexpr int kState = 4;  // the last four

// The lane with its sum in [1, 2), where it is not 0.
SW_HD Lane normalised(const Lane& lane) {
  const int32_t exponent = (int32_t)(bits_of(lane.sum) >> 23) - 127;
  const float scale = power_of_two(-exponent);
  return {lane.origin - (float)exponent, lane.sum * scale, lane.squares * scale * scale};
}

// Whether a row need not be done again on z - max z: total is its normalised sum over j != y, label its z_y.
SW_HD bool settled(const Lane& total, float label) {
  return (total.sum >= 0) & (total.origin < kRounder - (kLowest + 128)) & (fabsf(label) <= kLimit);
}

// total and label are of z - shift; where shift is not 0, label <= 0. NaN in either makes everything NaN.
SW_HD Row finished(const Lane& total, float label, float shift) {
  const float bounded = select(label < -kLimit, -kLimit, label);
  const float origin = origin_of(bounded);
  const float own = scaled_exp(bounded, origin, kFaint);  // exp(z_y) = own 2^(K + d), the others' sum total.sum 2^K
  const int32_t d = distance(origin, total.origin);
  const bool likely = d >= 0;
  const float scale = power_of_two(likely ? -d : d);
  const float large = select(likely, own, total.sum);
  const float small = select(likely, total.sum, own) * scale;
  const float x = small / large;
  const float steps = select(likely, 0.0f, (float)d);
  const float offset = select(likely, 0.0f, log_positive(total.sum / own)) - steps * 1.42860677e-06f;
  const float loss = (bounded - label) + (log1p_positive(x) + offset - steps * 0.693145752f);
  const float complement = select(likely, x, 1.0f) / (1.0f + x);
  const float spread = select(total.sum > 0, total.squares / total.sum / total.sum, 0.0f);
  if (!(total.sum >= 0) | !(label == label)) return {NAN, NAN, NAN, NAN, NAN, NAN};
  return {loss,
          complement * sqrtf(1.0f + spread),
          shift + 0.0f,  // not -0, which may be the maximum of zeros
          select(likely, origin, total.origin),
          1.0f / (large + small),
          complement};
}

// The gradient at one class that is not the label; coefficient = inverse * grad.
SW_HD float share_of_gradient(float z, float shift, float origin, float coefficient) {
  return scaled_exp(z - shift, origin, 125) * coefficient;
}

// Logits in 16 bits, by bits alone. -----------------------------------------------------------------------------------

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

SW_HD float to_float(float x) { return x; }
SW_HD float to_float(Bf16 x) { return float_of((uint32_t)x.bits << 16); }
SW_HD float to_float(Fp16 x) {
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const uint32_t normal = magnitude + (112u << 23);
  const uint32_t tiny = bits_of(float_of(magnitude + (113u << 23)) - float_of(113u << 23));
  const uint32_t finite = magnitude < (1u << 23) ? tiny : normal;
  return float_of(sign | (magnitude >= (31u << 23) ? magnitude + (224u << 23) : finite));
#endif
}

// Rounded to the nearest, to the even one of two.
template <class T>
SW_HD T from_float(float x);
template <>
SW_HD float from_float<float>(float x) {
  return x;
}
template <>
SW_HD Bf16 from_float<Bf16>(float x) {
#ifdef __CUDA_ARCH__
  Bf16 value;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(value.bits) : "f"(x));
  return value;
#else
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {(uint16_t)(x == x ? rounded : 0x7fc0u)};
#endif
}
template <>
SW_HD Fp16 from_float<Fp16>(float x) {
#ifdef __CUDA_ARCH__
  Fp16 value;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(value.bits) : "f"(x));
  return value;
#else
  const uint32_t sign = (bits_of(x) >> 16) & 0x8000u;
  const uint32_t bits = bits_of(x) & 0x7fffffffu;
  const uint32_t normal = (bits + 0xfffu + ((bits >> 13) & 1u) - (112u << 23)) >> 13;
  const uint32_t tiny = bits_of(float_of(bits) + 0.5f) - bits_of(0.5f);
  const uint32_t finite = bits < (113u << 23) ? tiny : normal;
  const uint32_t large = bits > (255u << 23) ? 0x7e00u : 0x7c00u;
  return {(uint16_t)(sign | (bits >= (143u << 23) ? large : finite))};
#endif
}

}  // namespace samplewise
