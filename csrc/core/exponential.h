// exp with the same float32 bits on every processor, as normal.h has its logarithm.
//
// The Triton twin is in ddpm_fast/ops/triton/arithmetic.py: same name, same order, same constants.
#pragma once

#include "core/macros.h"

namespace ddpm {

// exp(r) = 1 + r + r^2 q(r) for |r| <= ln 2 / 2, q a minimax polynomial.
DDPM_HD float exponential_near_0(float r) {
  float q = 0x1.6a5228p-10f;
  q = fma(q, r, 0x1.12396cp-7f);
  q = fma(q, r, 0x1.5558aap-5f);
  q = fma(q, r, 0x1.555492p-3f);
  q = fma(q, r, 0x1.fffffcp-2f);
  return 1.0f + fma(r * r, q, r);
}

// Up to here exponential() is exponential_near_0() to the bit: its k is 0.
constexpr float kNear0 = 0x1.6p-2f;

// exp(x) within 1.1 units in the last place; infinite above 88.73, 0 below -103.98, NaN for NaN.
// exp(x) = 2^k exp(r).
DDPM_HD float exponential(float x) {
  // Into [-104, 89], by the order of the bits, as in silu(); a NaN is put back at the end.
  constexpr int32_t kHigh = 0x42B20000;
  constexpr uint32_t kLow = 0xC2D00000u;
  const int32_t word = static_cast<int32_t>(bits_of(x));
  const uint32_t below = static_cast<uint32_t>(word < kHigh ? word : kHigh);
  const float bounded = float_of(below < kLow ? below : kLow);
  // Adding this leaves k + 254 in the last places.
  constexpr float kRound = 0x1.8p23f + 254.0f;
  const float shifted = fma(bounded, 0x1.715476p+0f, kRound);
  const float k = shifted - kRound;
  // ln 2 in two parts: k * high is exact.
  float r = fma(k, -0x1.62p-1f, bounded);
  r = fma(k, -0x1.c85fep-10f, r);
  const float p = exponential_near_0(r);
  // 2^k as two powers of half the exponent: alone it may be out of range where exp(x) is not.
  const uint32_t first = bits_of(shifted) >> 1 << 23;
  const uint32_t second = (bits_of(shifted) << 23) - first;
  const float result = p * float_of(first) * float_of(second);
  return x == x ? result : x;
}

DDPM_HD double exponential(double x) {
  return __builtin_exp(x);
}

}  // namespace ddpm
