#include "cuda/group_norm/launch.cuh"

namespace ddpm {

int cuda_group_norm_f32(const GroupNormArgs& args, const NormPlan& plan, bool overlaps,
                        void* stream) {
  return queue_norm<float>(args, plan, overlaps, stream);
}

}  // namespace ddpm
