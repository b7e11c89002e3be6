// Arithmetic of GroupNorm (Wu and He 2018) with modulation and SiLU, for host and device.
#pragma once

#include "core/macros.h"

namespace ddpm {

// exp(-y) with a relative error below 4e-7 for y in [-88, 87]; infinity for y = -89, NaN for NaN.
// exp(-y) = 2^n exp(-r) with |r| <= ln 2 / 2, and exp(-r) = 1 - r + r^2 q(-r), q a minimax
// polynomial. Without fma, so that it is equally fast on processors without one.
DDPM_HD float exp_of_minus(float y) {
  constexpr float kRound = 0x1.8p23f;  // adding it leaves an integer in the lowest bits
  const float shifted = y * -0x1.715476p0f + kRound;
  const float n = shifted - kRound;
  // ln 2 is split into two parts, so that n * high is exact.
  const float r = (y + n * 0.693359375f) + n * -2.12194440e-4f;
  float q = -0x1.10627ap-7f;
  q = q * r + 0x1.572a08p-5f;
  q = q * r + -0x1.5557aep-3f;
  q = q * r + 0x1.fffdfcp-2f;
  const float scale = float_of((bits_of(shifted) << 23) + 0x3F800000u);  // infinity for n = 128
  return (q * (r * r) + (1.0f - r)) * scale;
}

// y / (1 + exp(-y)). As in PyTorch, -inf and NaN give NaN.
DDPM_HD float silu(float y) {
#if defined(__CUDA_ARCH__)
  float e, reciprocal;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(y * -0x1.715476p0f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(1.0f + e));
  return y * reciprocal;
#else
  // Clamp to [-89, 87] by comparing bit patterns: GCC compiles a selection between floats into two
  // divisions. NaN needs no care here, because the numerator is NaN.
  constexpr int32_t kHigh = 0x42AE0000;   // 87
  constexpr uint32_t kLow = 0xC2B20000u;  // -89
  const int32_t word = static_cast<int32_t>(bits_of(y));
  const uint32_t below = static_cast<uint32_t>(word < kHigh ? word : kHigh);
  const float bounded = float_of(below < kLow ? below : kLow);
  const float e = exp_of_minus(bounded);
  return y / (1.0f + e);
#endif
}

DDPM_HD double silu(double y) {
  return y / (1.0 + __builtin_exp(-y));
}

// 1 / sqrt(a).
DDPM_HD float reciprocal_sqrt(float a) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("rsqrt.approx.f32 %0, %1;" : "=f"(result) : "f"(a));
  return result;
#else
  return 1.0f / sqrt_rn(a);
#endif
}

// gain * value + offset: the affine parameters and the modulation, applied to a normalised value.
template <class R>
struct Affine {
  R gain, offset;
};

// (value * weight + bias) (1 + scale) + shift.
template <class R>
DDPM_HD Affine<R> modulated(R weight, R bias, R scale, R shift) {
  const R factor = R(1) + scale;
  return {weight * factor, bias * factor + shift};
}

}  // namespace ddpm
