#include "cuda/diffusion/launch.cuh"
#include "cuda/launch.h"

namespace ddpm {

int cuda_reverse_step(const ReverseStepArgs& args, void* stream) {
  return run_on(stream, args);
}

}  // namespace ddpm
