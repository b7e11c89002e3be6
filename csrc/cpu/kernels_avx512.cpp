#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=x86-64-v4"))), apply_to = function)
#else
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#endif
#define DDPM_ISA avx512
#define DDPM_F16C
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define DDPM_PERMUTES 16
#endif
#endif
#include "cpu/kernels.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
