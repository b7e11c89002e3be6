// Launches group_norm_ on the current device: the plan, then the kernel for the dtype.
#include <cuda_runtime_api.h>

#include <atomic>

#include "cuda/group_norm/plan.h"
#include "cuda/launch.h"

namespace ddpm {

int cuda_group_norm_f16(const GroupNormArgs&, const NormPlan&, bool overlaps, void* stream);
int cuda_group_norm_bf16(const GroupNormArgs&, const NormPlan&, bool overlaps, void* stream);
int cuda_group_norm_f32(const GroupNormArgs&, const NormPlan&, bool overlaps, void* stream);

namespace {

__global__ void compiled_for() {}

struct DeviceInfo {
  int multiprocessors;
  bool has_clusters;
};

// Clusters and overlapping launches need code compiled for sm_90, not only a GPU that supports
// them: other code has neither the exchange nor the wait.
cudaError_t query_device(int device, DeviceInfo* info) {
  cudaFuncAttributes code{};
  cudaError_t error = cudaFuncGetAttributes(&code, compiled_for);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&info->multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  info->has_clusters = code.ptxVersion >= 90;
  return error;
}

// Cached per device as 2 * multiprocessors + has_clusters.
cudaError_t device_info(DeviceInfo* info) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const int found = device < kDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (found != 0) {
    *info = {found / 2, found % 2 == 1};
    return cudaSuccess;
  }
  error = query_device(device, info);
  if (error == cudaSuccess && device < kDevices) {
    known[device].store(2 * info->multiprocessors + info->has_clusters, std::memory_order_relaxed);
  }
  return error;
}

}  // namespace

int cuda_group_norm(const GroupNormArgs& args, void* stream) {
  DeviceInfo info{};
  const cudaError_t error = device_info(&info);
  if (error != cudaSuccess) {
    cudaGetLastError();  // no later check reports it again
    return error;
  }
  const NormPlan plan =
      choose_group_norm(args, {info.multiprocessors, info.has_clusters ? 3u : 0u});
  switch (args.dtype) {
    case DType::f16:
      return cuda_group_norm_f16(args, plan, info.has_clusters, stream);
    case DType::bf16:
      return cuda_group_norm_bf16(args, plan, info.has_clusters, stream);
    case DType::f32:
      return cuda_group_norm_f32(args, plan, info.has_clusters, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace ddpm
