// The fused updates for one thread, and the selection of a variant for given arguments.
//
// No CUDA header is included: the kernels call run_thread(), and so do the host tests.
// core/diffusion.h has the arithmetic. A thread loads all inputs, computes, and then stores, so
// that x can be updated in place. A variant is a noise source and a kind of tensor:
// VectorizedTensor if all tensors consist of aligned Vec4s, otherwise View.
#pragma once

#include <initializer_list>

#include "core/args.h"
#include "core/diffusion.h"
#include "cuda/common/vectorized.cuh"
#include "cuda/diffusion/noise.cuh"
#include "cuda/diffusion/reverse_step_terms.cuh"
#include "cuda/diffusion/state.cuh"

namespace ddpm {

// Clamps t to the rows of the table.
DDPM_HD int64_t row_of(int64_t t, int64_t num_timesteps) {
  t = t < num_timesteps ? t : num_timesteps - 1;
  return t > 0 ? t : 0;
}

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

// Runs one thread of a block.
template <class Variant>
DDPM_HD void run_thread(const typename Variant::Params& params, const BlockIndex& block,
                        uint32_t thread) {
  const Position position = Variant::Blocks::position(params.grid, block, thread);
  if (position.sample < params.grid.samples) Variant::run(params, position);
}

constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue

// Calls launch(variant, params) for the kind of tensor that fits all views, and returns its result.
// `outputs` are model outputs, which may also be pixels with gaps. `vectors` is false if the caller
// rules out vectorized access.
template <template <Noise, class, bool...> class Variant, Noise kNoise, bool... kFlags, class Args,
          class Launch>
int choose(const Args& a, std::initializer_list<const View*> views,
           std::initializer_list<const View*> outputs, bool vectors, Launch launch) {
  if (vec4s_of(a.elements) > kMaxVec4s) return kInvalidValue;
  vectors = vectors && vec4s_of(a.elements) >= kThreads;
  bool wide = false;
  for (const View* view : views) {
    if (view->data == nullptr) continue;
    wide = wide || view->dtype == DType::f64;
    vectors = vectors && is_vectorizable(*view, a.samples, a.elements);
  }
  for (const View* view : outputs) {
    if (view->data == nullptr) continue;
    wide = wide || view->dtype == DType::f64;
    vectors =
        vectors && (is_vectorizable(*view, a.samples, a.elements) || in_pixels(*view, a.elements));
  }
  if (wide) return kInvalidValue;
  using Vectors = Variant<kNoise, VectorizedTensor, kFlags...>;
  using Views = Variant<kNoise, View, kFlags...>;
  return vectors ? launch(Vectors{}, Vectors::params(a)) : launch(Views{}, Views::params(a));
}

template <template <Noise, class> class Variant, Noise kNoise, class Args, class Launch>
int choose(const Args& a, std::initializer_list<const View*> views, Launch launch) {
  return choose<Variant, kNoise>(a, views, {}, true, launch);
}

template <class Launch>
int dispatch(const QSampleArgs& a, Launch launch) {
  const auto views = {&a.x0, &a.noise, &a.x_t};
  return a.rng.state ? choose<QSample, Noise::generated>(a, views, launch)
                     : choose<QSample, Noise::input>(a, views, launch);
}

template <class Launch>
int dispatch(const QPosteriorArgs& a, Launch launch) {
  return choose<QPosterior, Noise::none>(a, {&a.x0, &a.x_t, &a.mean}, launch);
}

template <template <Noise, class, bool> class Variant, bool kInPlace, class Launch>
int choose_step(const ReverseStepArgs& a, std::initializer_list<const View*> views,
                std::initializer_list<const View*> outputs, bool vectors, Launch launch) {
  if constexpr (kInPlace) {
    if (a.rng.state) {
      return choose<Variant, Noise::generated, kInPlace>(a, views, outputs, vectors, launch);
    }
  }
  return a.noise.data ? choose<Variant, Noise::input, kInPlace>(a, views, outputs, vectors, launch)
                      : choose<Variant, Noise::none, kInPlace>(a, views, outputs, vectors, launch);
}

template <bool kInPlace, class Launch>
int dispatch_step(const ReverseStepArgs& a, Launch launch) {
  if (a.flags & kMultistepTerms) {
    const auto views = {&a.x,       &a.source, &a.noise,  &a.model_input,
                        &a.pred_x0, &a.second, &a.history};
    const auto outputs = {&a.out, &a.out2, &a.log_variance};
    const bool vectors = a.depth < 2 || a.slot_stride % 4 == 0;  // also in the other slots
    return choose_step<StepTerms, kInPlace>(a, views, outputs, vectors, launch);
  }
  const auto views = {&a.x, &a.source, &a.out, &a.noise, &a.model_input, &a.pred_x0};
  return choose_step<ReverseStep, kInPlace>(a, views, {}, true, launch);
}

template <class Launch>
int dispatch(const ReverseStepArgs& a, Launch launch) {
  if (!a.source.data) return dispatch_step<true>(a, launch);
  const bool in_place_only = a.rng.state || a.model_input.data || (a.flags & ~kFunctionalFlags);
  return in_place_only ? kInvalidValue : dispatch_step<false>(a, launch);
}

template <class Launch>
int dispatch(const PhiloxNormalArgs& a, Launch launch) {
  return choose<PhiloxNormal, Noise::generated>(a, {&a.out}, launch);
}

}  // namespace ddpm
