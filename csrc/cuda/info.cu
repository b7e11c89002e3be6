#include <cuda_runtime_api.h>

#include "cuda/launch.h"

#define DDPM_TEXT_(...) #__VA_ARGS__
#define DDPM_TEXT(...) DDPM_TEXT_(__VA_ARGS__)

#if !defined(DDPM_CUDA_ARCHS)
#define DDPM_CUDA_ARCHS __CUDA_ARCH_LIST__
#endif

namespace ddpm {

const char* cuda_error_string(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

const char* cuda_architectures() {
  return DDPM_TEXT(DDPM_CUDA_ARCHS);
}

}  // namespace ddpm
