// q_sample for one thread (see dispatch.cuh).
#pragma once

#include "core/args.h"
#include "core/diffusion.h"
#include "cuda/diffusion/noise.cuh"
#include "cuda/diffusion/timestep.cuh"

namespace ddpm {

template <Noise kNoise, class Tensor>
struct QSample {
  using Blocks = BlocksFor<Tensor>;

  struct Params {
    Grid grid;
    Tensor x0, noise, x_t;
    const int64_t* t;
    int64_t t_stride;
    const float* coefs;
    int64_t num_timesteps;
    const int64_t* rng;
  };

  static Params params(const QSampleArgs& a) {
    return {make_grid(a.samples, a.elements),
            tensor_of<Tensor>(a.x0),
            tensor_of<Tensor>(a.noise),
            tensor_of<Tensor>(a.x_t),
            a.t,
            a.t_stride,
            static_cast<const float*>(a.coefs),
            a.num_timesteps,
            a.rng.state};
  }

  static DDPM_HD void run(const Params& p, const Position& position) {
    constexpr int kN = kVec4s<Tensor>;
    Bits x0_bits[kN] = {}, noise_bits[kN] = {};
    Vec4 x0[kN], noise[kN], x_t[kN];
    NoiseKey key{};
    const int64_t t = p.t[position.sample * p.t_stride];
    load(p.x0, p.grid, position, x0_bits);
    if constexpr (kNoise == Noise::input) load(p.noise, p.grid, position, noise_bits);
    if constexpr (kNoise == Noise::generated) key = load_key(p.rng);
    const float* coefs = p.coefs + 2 * row_of(t, p.num_timesteps);
    const float signal_scale = coefs[0], noise_scale = coefs[1];
    convert(p.x0, x0_bits, x0);
    if constexpr (kNoise == Noise::input) {
      convert(p.noise, noise_bits, noise);
    } else {
      // x_t is computed from the returned noise, which is rounded to its dtype.
      generate_noise(key, 0, position, noise);
      round_to(p.noise.dtype, noise);
      store(p.noise, p.grid, position, noise);
    }
    DDPM_UNROLL
    for (int i = 0; i < kN; ++i) {
      DDPM_UNROLL
      for (int j = 0; j < 4; ++j) {
        x_t[i].v[j] = q_sample(x0[i].v[j], noise[i].v[j], signal_scale, noise_scale);
      }
    }
    store(p.x_t, p.grid, position, x_t);
  }
};

}  // namespace ddpm
