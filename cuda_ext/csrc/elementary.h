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

}  // namespace samplewise
