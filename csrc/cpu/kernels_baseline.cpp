// For every processor. Without an fma instruction each fma is a library call: correct, but slow.
#define DDPM_ISA baseline
#include "cpu/kernels.inl"
