// Conversions between float32 and float16 or bfloat16, rounding to nearest even.
//
// On the host this is integer code, so that loops vectorise on every instruction set and the result
// does not depend on the flush-to-zero mode. On the device it is the conversion instruction. NaN
// stays NaN.
#pragma once

#include "core/macros.h"

namespace ddpm {

struct half_t {
  uint16_t bits;
};
struct bfloat16_t {
  uint16_t bits;
};

DDPM_HD float to_float(half_t h) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(h.bits));
  return value;
#else
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000u) << 16;
  const uint32_t magnitude = h.bits & 0x7FFFu;
  const uint32_t normal = (magnitude << 13) + (magnitude >= 0x7C00u ? 0x70000000u : 0x38000000u);
  const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  return float_of(sign | (magnitude < 0x0400u ? bits_of(subnormal) : normal));
#endif
}

DDPM_HD half_t to_half(float value) {
#if defined(__CUDA_ARCH__)
  half_t h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(value));
  return h;
#else
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  const uint32_t rebased = magnitude - 0x38000000u;
  const uint32_t normal = (rebased + 0x0FFFu + ((rebased >> 13) & 1u)) >> 13;
  // Below 2^-14 the last bit of the sum is 2^-24, the spacing of float16's subnormals.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477FF000u ? 0x7C00u : result;
  result = magnitude > 0x7F800000u ? 0x7E00u : result;
  return {static_cast<uint16_t>(sign | result)};
#endif
}

DDPM_HD float to_float(bfloat16_t b) {
  return float_of(static_cast<uint32_t>(b.bits) << 16);
}

DDPM_HD bfloat16_t to_bfloat16(float value) {
#if defined(__CUDA_ARCH__)
  bfloat16_t b;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(b.bits) : "f"(value));
  return b;
#else
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  return {static_cast<uint16_t>(nan ? ((bits >> 16) | 0x0040u) : rounded)};
#endif
}

}  // namespace ddpm
