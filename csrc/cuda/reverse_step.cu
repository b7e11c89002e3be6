#include "cuda/launch.h"
#include "cuda/run.cuh"

namespace ddpm {

int cuda_reverse_step(const ReverseStepArgs& args, void* stream) {
  return run_on(stream, args);
}

}  // namespace ddpm
