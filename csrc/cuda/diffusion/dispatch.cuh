// Selection of the kernel variant for given arguments, and its execution for one thread.
//
// No CUDA header is included: the kernels call run_thread(), and so do the host tests.
// core/diffusion.h has the arithmetic. A variant is a noise source and a kind of tensor:
// VectorizedTensor if all tensors consist of aligned Vec4s, otherwise View. In each variant a
// thread loads all inputs, computes, and then stores, so that x can be updated in place.
#pragma once

#include <initializer_list>

#include "cuda/diffusion/philox_normal.cuh"
#include "cuda/diffusion/q_posterior.cuh"
#include "cuda/diffusion/q_sample.cuh"
#include "cuda/diffusion/reverse_step.cuh"
#include "cuda/diffusion/reverse_step_terms.cuh"

namespace ddpm {

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
