#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=x86-64-v4"))), apply_to = function)
#else
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#endif
#define DDPM_ISA avx512
#define DDPM_F16C
#include "cpu/kernels.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
