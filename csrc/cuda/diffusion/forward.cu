#include "cuda/diffusion/launch.cuh"
#include "cuda/launch.h"

namespace ddpm {

int cuda_q_sample(const QSampleArgs& args, void* stream) {
  return run_on(stream, args);
}

int cuda_q_posterior(const QPosteriorArgs& args, void* stream) {
  return run_on(stream, args);
}

int cuda_philox_normal(const PhiloxNormalArgs& args, void* stream) {
  return run_on(stream, args);
}

}  // namespace ddpm
