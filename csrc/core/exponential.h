// exp with the same float32 bits on every processor, like the logarithm of normal.h.
//
// ddpm_fast/ops/triton/arithmetic.py has the same function for Triton: same order of operations,
// same constants.
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

// For |x| up to here, exponential() equals exponential_near_0() bit for bit, because k is 0.
constexpr float kNear0 = 0x1.6p-2f;

// exp(x) within 1.1 ulp; infinity above 88.73, 0 below -103.98, NaN for NaN. exp(x) = 2^k exp(r).
DDPM_HD float exponential(float x) {
  // Clamp to [-104, 89] by comparing bit patterns, as in silu(). NaN is restored at the end.
  constexpr int32_t kHigh = 0x42B20000;
  constexpr uint32_t kLow = 0xC2D00000u;
  const int32_t word = static_cast<int32_t>(bits_of(x));
  const uint32_t below = static_cast<uint32_t>(word < kHigh ? word : kHigh);
  const float bounded = float_of(below < kLow ? below : kLow);
  // Adding kRound leaves k + 254 in the lowest bits.
  constexpr float kRound = 0x1.8p23f + 254.0f;
  const float shifted = fma(bounded, 0x1.715476p+0f, kRound);
  const float k = shifted - kRound;
  // ln 2 is split into two parts, so that k * high is exact.
  float r = fma(k, -0x1.62p-1f, bounded);
  r = fma(k, -0x1.c85fep-10f, r);
  const float p = exponential_near_0(r);
  // 2^k is the product of two powers with half the exponent: alone it can be out of range where
  // exp(x) is not.
  const uint32_t first = bits_of(shifted) >> 1 << 23;
  const uint32_t second = (bits_of(shifted) << 23) - first;
  const float result = p * float_of(first) * float_of(second);
  return x == x ? result : x;
}

DDPM_HD double exponential(double x) {
  return __builtin_exp(x);
}

}  // namespace ddpm
