#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=x86-64-v3"))), apply_to = function)
#else
#pragma GCC target("arch=x86-64-v3")
#endif
#define DDPM_ISA avx2
#define DDPM_F16C
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define DDPM_PERMUTES 8
#endif
#endif
#include "cpu/kernels.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
