// The CPU kernels: one table of functions for each instruction set they are compiled for.
//
// A kernel works on a range of blocks, so that the caller decides how to spread them over threads.
// The same bits come out whatever the instruction set and the number of threads.
#pragma once

#include "core/args.h"

namespace ddpm {

// Elements: a multiple of the four normals of a Philox block, and of the channels of most images.
constexpr int64_t kBlock = 3072;

// At least one: q_posterior has a variance for a sample without elements too.
DDPM_HD int64_t blocks_per_sample(int64_t elements) {
  return elements > 0 ? (elements + kBlock - 1) / kBlock : 1;
}

// How group_norm_ is divided into units of work: some whole groups of one sample each, whatever the
// batch. `cached`: their values are cached in the arithmetic's type from pass to pass.
struct NormSlabs {
  static constexpr int64_t kCached = 65536;           // values: 256 KiB in float32
  static constexpr int64_t kBlock = 8192;             // values that are gathered at a time
  static constexpr int64_t kNarrow = 16, kWide = 64;  // channels that a slab should have

  int64_t channels, per_sample;
  bool cached;

  DDPM_HD explicit NormSlabs(const GroupNormArgs& a) {
    const int64_t size = a.group_size();
    const int64_t fitting = kCached / a.pixels();
    const int64_t wanted = fitting < kNarrow ? kNarrow : (fitting < kWide ? fitting : kWide);
    int64_t groups = wanted / size;
    groups = groups < 1 ? 1 : (groups < a.groups ? groups : a.groups);
    channels = groups * size;
    per_sample = (a.groups + groups - 1) / groups;
    cached = channels <= fitting;
  }

  static DDPM_HD int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }
  DDPM_HD int64_t block() const { return channels > kBlock ? channels : kBlock; }

  // Of the memory that a call of the kernel needs for itself.
  DDPM_HD int64_t workspace_bytes(const GroupNormArgs& a) const {
    const int64_t width = a.dtype == DType::f64 ? 8 : 4;
    return 5 * padded(channels * width) + padded(channels * 8) + padded(block() * width) +
           (cached ? padded(channels * a.pixels() * width) : 0);
  }
};

struct CpuKernels {
  const char* name;
  void (*q_sample)(const QSampleArgs&, int64_t begin, int64_t end);
  void (*q_posterior)(const QPosteriorArgs&, int64_t begin, int64_t end);
  void (*reverse_step)(const ReverseStepArgs&, int64_t begin, int64_t end);
  void (*philox_normal)(const PhiloxNormalArgs&, int64_t begin, int64_t end);
  // Works on slabs, in a workspace of its own at a multiple of 64 bytes.
  void (*group_norm)(const GroupNormArgs&, int64_t begin, int64_t end, void* workspace);
};

// The widest that this processor runs, or those that select_cpu_kernels selected.
const CpuKernels& cpu_kernels();

// Selects "baseline", "avx2", "avx512" or "auto"; false where it is unknown or cannot run here.
bool select_cpu_kernels(const char* name);

}  // namespace ddpm
