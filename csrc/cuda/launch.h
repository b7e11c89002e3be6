// Launchers of the CUDA kernels. This header needs no CUDA header, and nothing below csrc/cuda
// includes torch.
//
// Each function launches one kernel on `stream` (a cudaStream_t) of the current device and returns
// a cudaError_t, 0 on success. All pointers, also those in Rng and in tables, are to memory of that
// device. The arithmetic is float32; tensors are float16, bfloat16 or float32. For float64 the
// result is cudaErrorInvalidValue.
#pragma once

#include "core/args.h"
#include "core/checksum.h"

namespace ddpm {

int cuda_q_sample(const QSampleArgs& args, void* stream);
int cuda_q_posterior(const QPosteriorArgs& args, void* stream);
int cuda_reverse_step(const ReverseStepArgs& args, void* stream);
int cuda_philox_normal(const PhiloxNormalArgs& args, void* stream);

// On sm_90 the kernel may start before the previous one has ended; it waits for it before it
// accesses global memory.
int cuda_group_norm(const GroupNormArgs& args, void* stream);

// Adds the checksums of `count` tensors to sums[0 .. count), in device memory.
int cuda_checksum(const ChecksumArgs* tensors, int64_t count, Checksum* sums, void* stream);

// Description of a cudaError_t.
const char* cuda_error_string(int error);

// Architectures that the kernels were compiled for: the build's "-DDDPM_CUDA_ARCHS=80 90a+PTX" (no
// string literal), otherwise the list of nvcc (800,900).
const char* cuda_architectures();

}  // namespace ddpm
