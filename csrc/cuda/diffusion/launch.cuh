// Launches the kernels of dispatch.cuh.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/diffusion/dispatch.cuh"

namespace ddpm {

static_assert(kInvalidValue == cudaErrorInvalidValue);

constexpr int64_t kMaxX = 0x7FFFFFFF, kMaxZ = 65535;  // limits of a grid

template <class Variant>
__global__ void __launch_bounds__(kThreads)
    run_kernel(const __grid_constant__ typename Variant::Params params) {
  run_thread<Variant>(params, {blockIdx.x, blockIdx.y, blockIdx.z, gridDim.y}, threadIdx.x);
}

template <class Args>
int run_on(void* stream, const Args& args) {
  return dispatch(args, [stream](auto variant, const auto& params) -> int {
    using Variant = decltype(variant);
    const Blocks blocks = Variant::Blocks::blocks(params.grid);
    if (blocks.x == 0 || blocks.y == 0) return cudaSuccess;
    if (blocks.x > kMaxX || blocks.z > kMaxZ) return cudaErrorInvalidConfiguration;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks.x), static_cast<unsigned>(blocks.y),
                          static_cast<unsigned>(blocks.z));
    config.blockDim = dim3(kThreads);
    config.stream = static_cast<cudaStream_t>(stream);
    const cudaError_t error = cudaLaunchKernelEx(&config, run_kernel<Variant>, params);
    if (error != cudaSuccess) cudaGetLastError();  // no later check reports it again
    return error;
  });
}

}  // namespace ddpm
