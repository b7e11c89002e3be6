// Conversions between a 32-bit word of a tensor and its float32 values; 16-bit types in pairs.
#pragma once

#include "core/half.h"

namespace ddpm {

template <class T>
struct Packed;

template <>
struct Packed<float> {
  static constexpr int kPerWord = 1, kValues = 4;
  static DDPM_HD float one(float value) { return value; }
  static DDPM_HD float rounded(float value) { return value; }
  static DDPM_HD void unpack(uint32_t word, float (&v)[1]) { v[0] = float_of(word); }
  static DDPM_HD uint32_t pack(const float (&v)[1]) { return bits_of(v[0]); }
};

template <>
struct Packed<half_t> {
  static constexpr int kPerWord = 2, kValues = 8;
  static DDPM_HD float one(half_t value) { return to_float(value); }
  static DDPM_HD half_t rounded(float value) { return to_half(value); }
  static DDPM_HD void unpack(uint32_t word, float (&v)[2]) {
#if defined(__CUDA_ARCH__)
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2;"
        "  cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
        : "=f"(v[0]), "=f"(v[1])
        : "r"(word));
#else
    v[0] = to_float(half_t{static_cast<uint16_t>(word)});
    v[1] = to_float(half_t{static_cast<uint16_t>(word >> 16)});
#endif
  }
  static DDPM_HD uint32_t pack(const float (&v)[2]) {
#if defined(__CUDA_ARCH__)
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(v[1]), "f"(v[0]));
    return word;
#else
    return to_half(v[0]).bits | static_cast<uint32_t>(to_half(v[1]).bits) << 16;
#endif
  }
};

template <>
struct Packed<bfloat16_t> {
  static constexpr int kPerWord = 2, kValues = 8;
  static DDPM_HD float one(bfloat16_t value) { return to_float(value); }
  static DDPM_HD bfloat16_t rounded(float value) { return to_bfloat16(value); }
  static DDPM_HD void unpack(uint32_t word, float (&v)[2]) {
    v[0] = float_of(word << 16);
    v[1] = float_of(word & 0xFFFF0000u);
  }
  static DDPM_HD uint32_t pack(const float (&v)[2]) {
#if defined(__CUDA_ARCH__)
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(v[1]), "f"(v[0]));
    return word;
#else
    return to_bfloat16(v[0]).bits | static_cast<uint32_t>(to_bfloat16(v[1]).bits) << 16;
#endif
  }
};

}  // namespace ddpm
