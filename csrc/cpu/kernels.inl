// The CPU kernels, compiled once per instruction set: kernels_*.cpp set the target, define DDPM_ISA
// and include this file. Every function is in namespace ddpm::DDPM_ISA or forced inline, so that
// the linker cannot mix the instruction sets.

#include <type_traits>

#include "core/diffusion.h"
#include "core/group_norm.h"
#include "core/half.h"
#include "core/normal.h"
#include "cpu/kernels.h"

namespace ddpm {
namespace DDPM_ISA {

#include "cpu/blocks.h"
#include "cpu/checksum.h"
#include "cpu/group_norm.h"
#include "cpu/noise.h"
#include "cpu/reverse_step.h"

DDPM_HD int64_t clamped(int64_t index, int64_t size) {
  index = index < 0 ? 0 : index;
  return index < size ? index : size - 1;
}

template <class R>
void q_sample_blocks(const QSampleArgs& a, int64_t begin, int64_t end) {
  alignas(64) R x0_scratch[kBlock], noise_scratch[kBlock], x_t_scratch[kBlock];
  alignas(64) float normals[kBlock];
  const int64_t per_sample = blocks_per_sample(a.elements);
  for (int64_t work = begin; work < end; ++work) {
    const Block b = block_at(work, per_sample, a.elements);
    const R* coefs =
        static_cast<const R*>(a.coefs) + 2 * clamped(a.t[b.sample * a.t_stride], a.num_timesteps);
    const R* noise;
    if (a.rng.state) {
      make_normals(normals, b.first, b.count, static_cast<uint32_t>(a.rng.state[1]),
                   static_cast<uint64_t>(a.rng.state[2]) + static_cast<uint64_t>(b.sample),
                   static_cast<uint64_t>(a.rng.state[0]));
      // x_t is computed from the returned noise, which is rounded to its dtype.
      scatter(a.noise, b.sample, b.first, b.count, normals);
      gather(a.noise, b.sample, b.first, b.count, noise_scratch);
      noise = noise_scratch;
    } else {
      noise = read_block(a.noise, b.sample, b.first, b.count, noise_scratch);
    }
    const R* x0 = read_block(a.x0, b.sample, b.first, b.count, x0_scratch);
    R* x_t = target_block(a.x_t, b.sample, b.first, x_t_scratch);
    const R signal_scale = coefs[0], noise_scale = coefs[1];
#pragma GCC ivdep
    for (int64_t i = 0; i < b.count; ++i) {
      x_t[i] = q_sample(x0[i], noise[i], signal_scale, noise_scale);
    }
    write_block(a.x_t, b.sample, b.first, b.count, x_t);
  }
}

template <class R>
void q_posterior_blocks(const QPosteriorArgs& a, int64_t begin, int64_t end) {
  alignas(64) R x0_scratch[kBlock], x_t_scratch[kBlock], mean_scratch[kBlock];
  const int64_t per_sample = blocks_per_sample(a.elements);
  for (int64_t work = begin; work < end; ++work) {
    const Block b = block_at(work, per_sample, a.elements);
    const R* coefs =
        static_cast<const R*>(a.coefs) + 4 * clamped(a.t[b.sample * a.t_stride], a.num_timesteps);
    if (b.first == 0) {
      static_cast<R*>(a.variance)[b.sample] = coefs[2];
      static_cast<R*>(a.log_variance)[b.sample] = coefs[3];
    }
    const R* x0 = read_block(a.x0, b.sample, b.first, b.count, x0_scratch);
    const R* x_t = read_block(a.x_t, b.sample, b.first, b.count, x_t_scratch);
    R* mean = target_block(a.mean, b.sample, b.first, mean_scratch);
    const R coef_x0 = coefs[0], coef_x_t = coefs[1];
#pragma GCC ivdep
    for (int64_t i = 0; i < b.count; ++i) {
      mean[i] = q_posterior_mean(x0[i], x_t[i], coef_x0, coef_x_t);
    }
    write_block(a.mean, b.sample, b.first, b.count, mean);
  }
}

inline void q_sample_any(const QSampleArgs& a, int64_t begin, int64_t end) {
  a.x_t.dtype == DType::f64 ? q_sample_blocks<double>(a, begin, end)
                            : q_sample_blocks<float>(a, begin, end);
}
inline void q_posterior_any(const QPosteriorArgs& a, int64_t begin, int64_t end) {
  a.mean.dtype == DType::f64 ? q_posterior_blocks<double>(a, begin, end)
                             : q_posterior_blocks<float>(a, begin, end);
}
inline void reverse_step_any(const ReverseStepArgs& a, int64_t begin, int64_t end) {
  a.x.dtype == DType::f64 ? reverse_step_blocks<double>(a, begin, end)
                          : reverse_step_blocks<float>(a, begin, end);
}

inline void philox_normal_any(const PhiloxNormalArgs& a, int64_t begin, int64_t end) {
  alignas(64) float normals[kBlock];
  const int64_t per_sample = blocks_per_sample(a.elements);
  for (int64_t work = begin; work < end; ++work) {
    const Block b = block_at(work, per_sample, a.elements);
    make_normals(normals, b.first, b.count, static_cast<uint32_t>(a.rng.state[1]),
                 static_cast<uint64_t>(a.rng.state[2]) + static_cast<uint64_t>(b.sample),
                 static_cast<uint64_t>(a.rng.state[0]));
    scatter(a.out, b.sample, b.first, b.count, normals);
  }
}

}  // namespace DDPM_ISA

#define DDPM_STRING_(x) #x
#define DDPM_STRING(x) DDPM_STRING_(x)
#define DDPM_JOIN_(a, b) a##b
#define DDPM_JOIN(a, b) DDPM_JOIN_(a, b)

extern const CpuKernels DDPM_JOIN(cpu_kernels_, DDPM_ISA);
const CpuKernels DDPM_JOIN(cpu_kernels_, DDPM_ISA) = {
    DDPM_STRING(DDPM_ISA),      DDPM_ISA::q_sample_any,      DDPM_ISA::q_posterior_any,
    DDPM_ISA::reverse_step_any, DDPM_ISA::philox_normal_any, DDPM_ISA::group_norm_any,
    DDPM_ISA::checksum_words,
};

}  // namespace ddpm
