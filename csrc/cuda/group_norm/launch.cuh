// Runs the phases of group_norm_ on the device, and launches the kernels.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/group_norm/phases.cuh"
#include "cuda/launch.h"

namespace ddpm {

template <class ThreadState>
struct DeviceExec {
  using Thread = ThreadState;
  Thread state;
  uint32_t cluster_bits;

  // Reads the position again in each phase, so that it occupies no registers in between.
  __device__ __forceinline__ void find_position() {
    uint32_t x, y, z, thread;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(x));
    asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(y));
    asm volatile("mov.u32 %0, %%ctaid.z;" : "=r"(z));
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    state.position = norm_position({x, y, z, gridDim.y}, cluster_bits, thread);
  }
  template <class F>
  __device__ __forceinline__ void each(F f) {
    find_position();
    f(state);
  }
  template <class Value>
  __device__ __forceinline__ void xor_add(Value value, uint32_t lanes) {
    float& v = value(state);
    v = v + __shfl_xor_sync(0xFFFFFFFFu, v, static_cast<int>(lanes));
  }
  template <class F>
  __device__ __forceinline__ void each_cluster_block(uint32_t blocks, F f) {
#if __CUDA_ARCH__ >= 900
    find_position();
    const uint32_t lane = state.position.thread % 32;
    if (lane >= blocks) return;
    float* memory;
    asm("mapa.u64 %0, %1, %2;" : "=l"(memory) : "l"(state.shared), "r"(lane));
    f(state, memory);
#endif
  }
  __device__ __forceinline__ void block_sync() { __syncthreads(); }
  __device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "barrier.cluster.arrive.release.aligned;\n"
        "barrier.cluster.wait.acquire.aligned;" ::
            : "memory");
#endif
  }
  __device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed.aligned;");
#endif
  }
  __device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
  }
  __device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  }
  __device__ __forceinline__ void release_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
  }
};

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kMostThreads, 1)
    run_norm(const __grid_constant__ typename Kernel::Params params, uint32_t cluster_bits) {
  extern __shared__ __align__(16) float norm_shared[];
  DeviceExec<typename Kernel::Thread> exec;
  exec.cluster_bits = cluster_bits;
  exec.state.shared = norm_shared;
  exec.find_position();
  if (exec.state.position.sample >= params.samples) return;
  exec.state.begin(params);
  Kernel::run(params, exec);
}

// `overlaps`: the code was compiled for sm_90 or later, and waits for the previous kernel itself.
template <class T>
int queue_norm(const GroupNormArgs& a, const NormPlan& plan, bool overlaps, void* stream) {
  return choose_norm<T>(
      a, plan, [=](auto kernel, const auto& params, const NormLaunch& how) -> int {
        constexpr int64_t kMaxX = 0x7FFFFFFF, kMaxZ = 65535;
        if (how.blocks.x > kMaxX || how.blocks.z > kMaxZ) return cudaErrorInvalidConfiguration;
        cudaLaunchAttribute attributes[2];
        cudaLaunchConfig_t config{};
        config.gridDim =
            dim3(static_cast<unsigned>(how.blocks.x), static_cast<unsigned>(how.blocks.y),
                 static_cast<unsigned>(how.blocks.z));
        config.blockDim = dim3(how.threads);
        config.dynamicSmemBytes = how.shared_bytes;
        config.stream = static_cast<cudaStream_t>(stream);
        config.attrs = attributes;
        if (overlaps) {
          cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
          attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
          attribute.val.programmaticStreamSerializationAllowed = 1;
        }
        if (how.cluster_bits > 0) {
          cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
          attribute.id = cudaLaunchAttributeClusterDimension;
          attribute.val.clusterDim.x = 1u << how.cluster_bits;
          attribute.val.clusterDim.y = 1;
          attribute.val.clusterDim.z = 1;
        }
        const cudaError_t error =
            cudaLaunchKernelEx(&config, run_norm<decltype(kernel)>, params, how.cluster_bits);
        if (error != cudaSuccess) cudaGetLastError();  // no later check reports it again
        return error;
      });
}

}  // namespace ddpm
