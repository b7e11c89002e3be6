// q_posterior for one thread (see dispatch.cuh).
#pragma once

#include "core/args.h"
#include "core/diffusion.h"
#include "cuda/diffusion/noise.cuh"
#include "cuda/diffusion/timestep.cuh"

namespace ddpm {

template <Noise, class Tensor>
struct QPosterior {
  using Blocks = BlocksFor<Tensor>;

  struct Params {
    Grid grid;
    Tensor x0, x_t, mean;
    const int64_t* t;
    int64_t t_stride;
    const float* coefs;
    int64_t num_timesteps;
    float* variance;
    float* log_variance;
  };

  static Params params(const QPosteriorArgs& a) {
    return {make_grid(a.samples, a.elements),
            tensor_of<Tensor>(a.x0),
            tensor_of<Tensor>(a.x_t),
            tensor_of<Tensor>(a.mean),
            a.t,
            a.t_stride,
            static_cast<const float*>(a.coefs),
            a.num_timesteps,
            static_cast<float*>(a.variance),
            static_cast<float*>(a.log_variance)};
  }

  static DDPM_HD void run(const Params& p, const Position& position) {
    constexpr int kN = kVec4s<Tensor>;
    Bits x0_bits[kN] = {}, x_t_bits[kN] = {};
    Vec4 x0[kN], x_t[kN], mean[kN];
    const int64_t t = p.t[position.sample * p.t_stride];
    load(p.x0, p.grid, position, x0_bits);
    load(p.x_t, p.grid, position, x_t_bits);
    const float* coefs = p.coefs + 4 * row_of(t, p.num_timesteps);
    const float coef_x0 = coefs[0], coef_x_t = coefs[1];
    if (position.first == 0) {
      p.variance[position.sample] = coefs[2];
      p.log_variance[position.sample] = coefs[3];
    }
    convert(p.x0, x0_bits, x0);
    convert(p.x_t, x_t_bits, x_t);
    DDPM_UNROLL
    for (int i = 0; i < kN; ++i) {
      DDPM_UNROLL
      for (int j = 0; j < 4; ++j) {
        mean[i].v[j] = q_posterior_mean(x0[i].v[j], x_t[i].v[j], coef_x0, coef_x_t);
      }
    }
    store(p.mean, p.grid, position, mean);
  }
};

}  // namespace ddpm
