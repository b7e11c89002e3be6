// What every processor runs. Without an fma instruction each fma is a library call: right, and
// slow.
#define DDPM_ISA baseline
#include "cpu/kernels.inl"
