#include "cuda/group_norm/launch.cuh"

namespace ddpm {

int cuda_group_norm_f16(const GroupNormArgs& args, const NormPlan& plan, bool overlaps,
                        void* stream) {
  return queue_norm<half_t>(args, plan, overlaps, stream);
}

}  // namespace ddpm
