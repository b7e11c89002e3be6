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

// Splits the work into several calls, as threads would.
template <class Problem>
void run_cpu(const Problem& problem, int64_t calls = 1) {
  const auto args = problem.args();
  const auto kernel = kernel_for(cpu_kernels(), &args);
  const int64_t work = problem.samples() * blocks_per_sample(problem.elements());
  for (int64_t i = calls; i-- > 0;) kernel(args, work * i / calls, work * (i + 1) / calls);
}

}  // namespace ddpm::test
