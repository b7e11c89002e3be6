#include "cuda/group_norm/launch.cuh"

namespace ddpm {

int cuda_group_norm_bf16(const GroupNormArgs& args, const NormPlan& plan, bool overlaps,
                         void* stream) {
  return queue_norm<bfloat16_t>(args, plan, overlaps, stream);
}

}  // namespace ddpm
