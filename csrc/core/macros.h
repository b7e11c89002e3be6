// Function attributes and elementary operations of csrc/core, for host and device.
//
// Everything is forced inline. The CPU kernels are compiled once per instruction set, and an
// out-of-line copy that the linker shares between them could bring AVX-512 code into the baseline
// path.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define DDPM_HD __host__ __device__ __forceinline__
#elif !defined(DDPM_HD)  // tests may define it, to compile faster
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

// The 64-bit product of two 32-bit numbers. nvcc would widen a constant first and multiply in 64
// bits.
DDPM_HD uint64_t mul_wide(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return uint64_t{a} * b;
#endif
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
