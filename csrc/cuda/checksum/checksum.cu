#include <cuda_runtime_api.h>

#include "cuda/checksum/thread.cuh"
#include "cuda/launch.h"

namespace ddpm {
namespace {

__device__ uint64_t sum_of_warp(uint64_t value) {
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFFu, static_cast<unsigned long long>(value), lanes);
  }
  return value;
}

__global__ void __launch_bounds__(kChecksumThreads)
    checksum_kernel(const __grid_constant__ ChecksumParams p) {
  const int tensor = tensor_of_block(p, blockIdx.x);
  const Checksum own =
      checksum_of_thread(p.tensors[tensor], blockIdx.x - p.first_block[tensor], threadIdx.x);
  const uint64_t sum = sum_of_warp(own.sum), product = sum_of_warp(own.product);
  if (threadIdx.x % 32 == 0) {
    Checksum* to = p.sums + tensor;
    atomicAdd(reinterpret_cast<unsigned long long*>(&to->sum), sum);
    atomicAdd(reinterpret_cast<unsigned long long*>(&to->product), product);
  }
}

}  // namespace

int cuda_checksum(const ChecksumArgs* tensors, int64_t count, Checksum* sums, void* stream) {
  for (int64_t first = 0; first < count; first += kMaxTensors) {
    ChecksumParams params{};
    params.count = static_cast<int32_t>(count - first < kMaxTensors ? count - first : kMaxTensors);
    params.sums = sums + first;
    int64_t blocks = 0;
    for (int i = 0; i < params.count; ++i) {
      params.tensors[i] = tensors[first + i];
      params.first_block[i] = static_cast<uint32_t>(blocks);
      blocks += (params.tensors[i].words() + kWordsOfBlock - 1) / kWordsOfBlock;
      if (blocks > 0x7FFFFFFF) return cudaErrorInvalidConfiguration;
    }
    params.first_block[params.count] = static_cast<uint32_t>(blocks);
    if (blocks == 0) continue;
    checksum_kernel<<<static_cast<unsigned>(blocks), kChecksumThreads, 0,
                      static_cast<cudaStream_t>(stream)>>>(params);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace ddpm
