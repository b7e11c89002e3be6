// philox_normal for one thread (see dispatch.cuh).
#pragma once

#include "core/args.h"
#include "cuda/diffusion/noise.cuh"

namespace ddpm {

template <Noise, class Tensor>
struct PhiloxNormal {
  using Blocks = BlocksFor<Tensor>;

  struct Params {
    Grid grid;
    Tensor out;
    const int64_t* rng;
  };

  static Params params(const PhiloxNormalArgs& a) {
    return {make_grid(a.samples, a.elements), tensor_of<Tensor>(a.out), a.rng.state};
  }

  static DDPM_HD void run(const Params& p, const Position& position) {
    Vec4 noise[kVec4s<Tensor>];
    generate_noise(load_key(p.rng), 0, position, noise);
    store(p.out, p.grid, position, noise);
  }
};

}  // namespace ddpm
