// The plain reverse step for one thread (see dispatch.cuh); reverse_step_terms.cuh has the other
// terms.
#pragma once

#include "core/args.h"
#include "core/diffusion.h"
#include "cuda/diffusion/noise.cuh"
#include "cuda/diffusion/state.cuh"

namespace ddpm {

template <Noise kNoise, class Tensor, bool kInPlace>
struct ReverseStep {
  using Blocks = BlocksFor<Tensor>;

  struct Params {
    Grid grid;
    State<Tensor, kInPlace> state;
    Tensor out, noise, model_input, pred_x0;
    const float* rows;
    int64_t num_rows;
    const int64_t* step;
    int64_t step_stride;
    int64_t flags;
    const int64_t* rng;
  };

  static Params params(const ReverseStepArgs& a) {
    return {make_grid(a.samples, a.elements),
            State<Tensor, kInPlace>::of(a),
            tensor_of<Tensor>(a.out),
            tensor_of<Tensor>(a.noise),
            tensor_of<Tensor>(a.model_input),
            tensor_of<Tensor>(a.pred_x0),
            static_cast<const float*>(a.rows),
            a.num_rows,
            a.step,
            a.step_stride,
            a.flags,
            a.rng.state};
  }

  static DDPM_HD void run(const Params& p, const Position& position) {
    constexpr int kN = kVec4s<Tensor>;
    Bits x_bits[kN] = {}, out_bits[kN] = {}, noise_bits[kN] = {};
    Vec4 x[kN], out[kN], noise[kN], x0[kN], next[kN];
    NoiseKey key{};
    const int64_t index = p.step[position.sample * p.step_stride];
    load(p.state.before(), p.grid, position, x_bits);
    load(p.out, p.grid, position, out_bits);
    if constexpr (kNoise == Noise::input) load(p.noise, p.grid, position, noise_bits);
    if constexpr (kNoise == Noise::generated) key = load_key(p.rng);
    if (index < 0 || index >= p.num_rows) {
      if constexpr (!kInPlace) store_nan<kN>(p, position);
      return;
    }
    const Row<float> row = load_row(p.rows, index);
    convert(p.state.before(), x_bits, x);
    convert(p.out, out_bits, out);
    if constexpr (kNoise == Noise::input) convert(p.noise, noise_bits, noise);
    if constexpr (kNoise == Noise::generated) generate_noise(key, index, position, noise);
    DDPM_UNROLL
    for (int i = 0; i < kN; ++i) {
      DDPM_UNROLL
      for (int j = 0; j < 4; ++j) {
        const float o = out[i].v[j];
        float v = predict_x0(x[i].v[j], o, row);
        if (p.flags & kClip) v = clip(v, row.clip);
        x0[i].v[j] = v;
        v = p.flags & kRawOut ? step_mean<true>(x[i].v[j], v, o, row)
                              : step_mean<false>(x[i].v[j], v, o, row);
        if constexpr (kNoise != Noise::none) v = add_noise(v, noise[i].v[j], row);
        next[i].v[j] = v;
      }
    }
    store(p.state.x, p.grid, position, next);
    if (p.pred_x0.data) store(p.pred_x0, p.grid, position, x0);
    if (!kInPlace || !p.model_input.data) return;
    if (p.flags & kScaleIn) {
      DDPM_UNROLL
      for (int i = 0; i < kN; ++i) {
        DDPM_UNROLL
        for (float& v : next[i].v) v = row.Cin * v;
      }
    }
    store(p.model_input, p.grid, position, next);
  }
};

}  // namespace ddpm
