// Runs a problem on the CPU kernels.
#pragma once

#include "cpu/kernels.h"
#include "problems.h"

namespace ddpm::test {

inline auto kernel_for(const CpuKernels& kernels, const QSampleArgs*) {
  return kernels.q_sample;
}
inline auto kernel_for(const CpuKernels& kernels, const QPosteriorArgs*) {
  return kernels.q_posterior;
}
inline auto kernel_for(const CpuKernels& kernels, const ReverseStepArgs*) {
  return kernels.reverse_step;
}
inline auto kernel_for(const CpuKernels& kernels, const PhiloxNormalArgs*) {
  return kernels.philox_normal;
}

// In `vectors` calls, as threads would share the work.
template <class Problem>
void run_cpu(const Problem& problem, int64_t vectors = 1) {
  const auto args = problem.args();
  const auto kernel = kernel_for(cpu_kernels(), &args);
  const int64_t work = problem.samples() * blocks_per_sample(problem.elements());
  for (int64_t i = vectors; i-- > 0;) kernel(args, work * i / vectors, work * (i + 1) / vectors);
}

}  // namespace ddpm::test
