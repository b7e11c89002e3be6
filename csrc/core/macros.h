// How a function of csrc/core is compiled: once, for the host and for the device.
//
// Everything here is forced inline. The CPU kernels are compiled once per instruction set, and an
// out-of-line copy that the linker shares between them could carry AVX-512 into the baseline path.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define DDPM_HD __host__ __device__ __forceinline__
#else
#define DDPM_HD inline __attribute__((always_inline))
#endif

namespace ddpm {

DDPM_HD float fma(float a, float b, float c) {
  return __builtin_fmaf(a, b, c);
}
DDPM_HD double fma(double a, double b, double c) {
  return __builtin_fma(a, b, c);
}
DDPM_HD float sqrt_rn(float a) {
  return __builtin_sqrtf(a);
}

DDPM_HD uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}
DDPM_HD float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace ddpm
