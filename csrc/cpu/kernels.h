// The CPU kernels: one table of functions per instruction set.
//
// A kernel processes a range of blocks, so that the caller can distribute them over threads. The
// bits of the results depend neither on the instruction set nor on the number of threads.
#pragma once

#include "core/args.h"
#include "core/checksum.h"

namespace ddpm {

// Elements of a block: a multiple of the four normals of a Philox block and of common channel
// counts.
constexpr int64_t kBlock = 3072;

// At least one: q_posterior writes a variance for a sample without elements too.
DDPM_HD int64_t blocks_per_sample(int64_t elements) {
  return elements > 0 ? (elements + kBlock - 1) / kBlock : 1;
}

// Units of work of group_norm_: a slab is some whole groups of one sample, independent of the batch
// size. `cached`: its values are converted once and cached for all passes.
struct NormSlabs {
  static constexpr int64_t kCached = 65536;  // most values of a cached slab: 256 KiB in float32
  static constexpr int64_t kBlock = 8192;    // values gathered at a time
  static constexpr int64_t kNarrow = 16, kWide = 64;  // preferred range of channels per slab

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

  // Size of the workspace that one call of the kernel needs.
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
  // Processes slabs; each call needs its own workspace, aligned to 64 bytes.
  void (*group_norm)(const GroupNormArgs&, int64_t begin, int64_t end, void* workspace);
  // Of words begin .. end - 1.
  Checksum (*checksum)(const ChecksumArgs&, int64_t begin, int64_t end);
};

// The kernels in use: the widest that run on this processor, or those that select_cpu_kernels
// selected.
const CpuKernels& cpu_kernels();

// Selects "baseline", "avx2", "avx512" or "auto"; returns false if the name is unknown or the
// instruction set is not available.
bool select_cpu_kernels(const char* name);

}  // namespace ddpm
