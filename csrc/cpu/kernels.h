// The CPU kernels: one table of functions for each instruction set they are compiled for.
//
// A kernel works on a range of blocks, so that the caller decides how to spread them over threads.
// The same bits come out whatever the instruction set and the number of threads.
#pragma once

#include "core/args.h"

namespace ddpm {

constexpr int64_t kBlock = 4096;  // elements; a multiple of the four normals of a Philox block

// At least one: q_posterior has a variance for a sample without elements too.
DDPM_HD int64_t blocks_per_sample(int64_t elements) {
  return elements > 0 ? (elements + kBlock - 1) / kBlock : 1;
}

struct CpuKernels {
  const char* name;
  void (*q_sample)(const QSampleArgs&, int64_t begin, int64_t end);
  void (*q_posterior)(const QPosteriorArgs&, int64_t begin, int64_t end);
  void (*reverse_step)(const ReverseStepArgs&, int64_t begin, int64_t end);
  void (*philox_normal)(const PhiloxNormalArgs&, int64_t begin, int64_t end);
};

// The widest that this processor runs, or the one that select_cpu_kernels chose.
const CpuKernels& cpu_kernels();

// Chooses "baseline", "avx2", "avx512" or "auto"; false where it is unknown or cannot run here.
bool select_cpu_kernels(const char* name);

// The names that can run here, widest last, separated by spaces.
const char* runnable_cpu_kernels();

}  // namespace ddpm
