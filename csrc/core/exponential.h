// exp with the same float32 bits on every processor, as normal.h has its logarithm.
//
// The Triton twin is in ddpm_fast/ops/triton_math.py: same name, same order, same constants.
#pragma once

#include "core/macros.h"

namespace ddpm {

// 2^n for n in [-126, 127].
DDPM_HD float power_of_two(int32_t n) {
  return float_of(static_cast<uint32_t>(n + 127) << 23);
}

// exp(x) within 1.1 units in the last place; infinite above 88.73, 0 below -103.98, NaN for NaN.
// exp(x) = 2^k exp(r) with |r| <= ln 2 / 2; exp(r) = 1 + r + r^2 q(r), q a minimax polynomial.
DDPM_HD float exponential(float x) {
  constexpr float kRound = 0x1.8p23f;  // adding it leaves an integer in the last places
  x = x < -104.0f ? -104.0f : x;
  x = x > 89.0f ? 89.0f : x;
  const float shifted = fma(x, 0x1.715476p+0f, kRound);
  const int32_t k = static_cast<int32_t>(bits_of(shifted) - 0x4B400000u);
  const float kf = shifted - kRound;
  // ln 2 in two parts: kf * high is exact.
  float r = fma(kf, -0x1.62p-1f, x);
  r = fma(kf, -0x1.c85fep-10f, r);
  float q = 0x1.6a5228p-10f;
  q = fma(q, r, 0x1.12396cp-7f);
  q = fma(q, r, 0x1.5558aap-5f);
  q = fma(q, r, 0x1.555492p-3f);
  q = fma(q, r, 0x1.fffffcp-2f);
  const float p = 1.0f + fma(r * r, q, r);
  // In two steps, because 2^k itself may be out of range where exp(x) is not.
  const int32_t half = k >> 1;
  return (p * power_of_two(half)) * power_of_two(k - half);
}

DDPM_HD double exponential(double x) {
  return __builtin_exp(x);
}

}  // namespace ddpm
