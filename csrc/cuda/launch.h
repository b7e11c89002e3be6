// The fused updates on CUDA. No CUDA header is needed here, and no torch header anywhere below.
//
// Each function queues one kernel on `stream` (a cudaStream_t) of the current device and returns a
// cudaError_t, 0 where it was queued. Every pointer, those inside Rng and the tables too, is to
// memory of that device. The arithmetic is float32; tensors are float16, bfloat16 or float32, and
// float64 is cudaErrorInvalidValue.
#pragma once

#include "core/args.h"

namespace ddpm {

int cuda_q_sample(const QSampleArgs& args, void* stream);
int cuda_q_posterior(const QPosteriorArgs& args, void* stream);
int cuda_reverse_step(const ReverseStepArgs& args, void* stream);
int cuda_philox_normal(const PhiloxNormalArgs& args, void* stream);

// On sm_90 the kernel may start before the one queued before it has ended, and waits for that one
// before it reads or writes anything.
int cuda_group_norm(const GroupNormArgs& args, void* stream);

// The text of a cudaError_t.
const char* cuda_error_string(int error);

// The architectures that the kernels were compiled for: what the build passed
// as "-DDDPM_CUDA_ARCHS=80 90a+PTX" (bare words, no string), or else nvcc's own list (800,900).
const char* cuda_architectures();

}  // namespace ddpm
