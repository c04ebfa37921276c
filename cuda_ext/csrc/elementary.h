// Elementary functions of float32 from additions, multiplications, divisions and moves of bits alone, shared by g++ and
// nvcc: with no contraction to fused operations (-ffp-contract=off, --fmad=false) every machine gives the same bits, and
// cuda_ext/elementary.py, which writes the same operations for whole tensors, gives them too.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define SW_HD __host__ __device__ __forceinline__
#else
#define SW_HD inline __attribute__((always_inline))
#endif

// Loops that vectorise are compiled for several generations of x86, of which the loader takes the best that the machine
// has; the bits are the same on all.
#if !defined(__x86_64__) || !defined(__gnu_linux__) || !defined(__GNUC__) || defined(__clang__) || defined(__CUDACC__)
#define SW_CLONES
#elif __GNUC__ >= 12
#define SW_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SW_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif

namespace samplewise {

SW_HD uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

SW_HD float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Natural logarithm of a positive, normal, finite x: with x = 2^e m, m in [sqrt(1/2), sqrt(2)), s = (m - 1) / (m + 1),
// log x = e log 2 + 2 artanh(s) = e log 2 + 2 (s + s^3/3 + s^5/5 + ...).
SW_HD float log_positive(float x) {
  const int32_t e = (int32_t)(bits_of(x) - 0x3f3504f3u) >> 23;
  const float f = float_of(bits_of(x) - ((uint32_t)e << 23)) - 1.0f;
  const float s = f / (2.0f + f);
  const float z = s * s;
  const float series = z * (2.0f / 3 + z * (2.0f / 5 + z * (2.0f / 7 + z * (2.0f / 9))));
  const float scale = (float)e;
  return scale * 0.693145752f + (scale * 1.42860677e-06f + (s * 2.0f + s * series));
}

// log(1 + x) of an x in [0, 2^100]: the logarithm of the rounded 1 + x, and to first order what the rounding took.
SW_HD float log1p_positive(float x) {
  const float u = 1.0f + x;
  return log_positive(u) + (x - (u - 1.0f)) / u;
}

// 2^d of an integer d <= 127; 0 below the normal numbers.
SW_HD float power_of_two(int32_t d) { return d < -126 ? 0.0f : float_of(((uint32_t)d + 127u) << 23); }

constexpr float kLog2e = 1.44269504f;
constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: around it the floats are the integers; adding it rounds to one

// exp(z) / 2^K to within 2.5e-7 of itself, for |z| <= 4096 and an integer K, given as origin = kRounder - K; 0 where it
// is below 2^-faint, for z = -inf too. exp(z) / 2^K lies below 2^31. With k the integer nearest to z / log 2 and
// f = z - k log 2, it is exp(f) 2^(k - K), exp(f) a polynomial on [-0.35, 0.35]; 0.693359375 k is exact.
// r = z * kLog2e + origin has k - K in its last bits.
SW_HD float scaled_exp(float z, float r, float origin, float faint) {
  const float k = r - origin;
  const float f = (z - k * 0.693359375f) - k * -2.12194440e-4f;
  const float series = 0.49999225f + f * (0.1666712f + f * (0.04189128f + f * 0.0083123986f));
  const float value = float_of(bits_of(1.0f + f * (1.0f + f * series)) + (bits_of(r) << 23));
  return r < kRounder - faint ? 0.0f : value;
}
SW_HD float scaled_exp(float z, float origin, float faint) {
  return scaled_exp(z, z * kLog2e + origin, origin, faint);
}

}  // namespace samplewise
