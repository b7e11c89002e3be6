// The reverse step with multistep terms, for one thread.
//
// The flags are tested at run time, once per Vec4; all threads take the same branches. All inputs
// are loaded before the first is used. With a history of depth 1 the slot of the past value is
// known, so that it is loaded with them; otherwise it is loaded as soon as the row is known.
#pragma once

#include "core/args.h"
#include "core/diffusion.h"
#include "cuda/diffusion/model_output.cuh"
#include "cuda/diffusion/noise.cuh"
#include "cuda/diffusion/state.cuh"

namespace ddpm {

template <Noise kNoise, class Tensor, bool kInPlace>
struct StepTerms {
  using Blocks = std::conditional_t<std::is_same_v<Tensor, View>, Flat, BlocksOfSamples<1>>;
  using Output = OutputOf<Tensor>;
  using Row = ddpm::Row<float>;

  struct Params {
    Grid grid;
    State<Tensor, kInPlace> state;
    Tensor noise, model_input, pred_x0, second, history;
    Output out, out2, log_variance;
    int64_t slot_bytes;
    int32_t depth;
    const float* rows;
    int64_t num_rows;
    const int64_t* step;
    int64_t step_stride;
    const float* threshold;
    int64_t threshold_stride;
    int64_t flags;
    const int64_t* rng;

    DDPM_HD bool has(int64_t flag) const {
      return (kInPlace || (flag & kFunctionalFlags)) && (flags & flag) != 0;
    }
    DDPM_HD bool has_past(int k) const { return has(kPast1 << (k - 1)); }
  };

  static Params params(const ReverseStepArgs& a) {
    const auto output = [&](const View& view) {
      return output_of<Output>(view, a.samples, a.elements);
    };
    return {make_grid(a.samples, a.elements),
            State<Tensor, kInPlace>::of(a),
            tensor_of<Tensor>(a.noise),
            tensor_of<Tensor>(a.model_input),
            tensor_of<Tensor>(a.pred_x0),
            tensor_of<Tensor>(a.second),
            tensor_of<Tensor>(a.history),
            output(a.out),
            output(a.out2),
            output(a.log_variance),
            a.slot_stride * (vector_bytes_of(a.history.dtype) / 4),
            static_cast<int32_t>(a.depth),
            static_cast<const float*>(a.rows),
            a.num_rows,
            a.step,
            a.step_stride,
            static_cast<const float*>(a.threshold),
            a.threshold_stride,
            a.flags,
            a.rng.state};
  }

  template <class F>
  static DDPM_HD void each(F f) {
    DDPM_UNROLL
    for (int j = 0; j < 4; ++j) f(j);
  }

  // Loads the past values, h1 first; slot_of(k) is the slot of h_k.
  template <class SlotOf>
  static DDPM_HD void load_past(const Params& p, const Position& position,
                                Bits (&past)[kDeepest][1], SlotOf slot_of) {
    DDPM_UNROLL
    for (int k = 1; k <= kDeepest; ++k) {
      if (!p.has_past(k)) continue;
      load(p.history, p.grid, position, past[k - 1], slot_of(k) * p.slot_bytes);
    }
  }

  static DDPM_HD void run(const Params& p, const Position& position) {
    Bits x_bits[1] = {}, out_bits[1] = {}, out2_bits[1] = {}, noise_bits[1] = {};
    Bits v_bits[1] = {}, y_bits[1] = {}, past_bits[kDeepest][1] = {};
    NoiseKey key{};
    float bound = 0.0f;
    const int64_t index = p.step[position.sample * p.step_stride];
    load(p.state.before(), p.grid, position, x_bits);
    load_output(p.out, p.grid, position, out_bits);
    if (p.has(kGuide)) load_output(p.out2, p.grid, position, out2_bits);
    if constexpr (kNoise == Noise::input) load(p.noise, p.grid, position, noise_bits);
    if constexpr (kNoise == Noise::generated) key = load_key(p.rng);
    if constexpr (kNoise != Noise::none) {
      if (p.has(kLearned)) load_output(p.log_variance, p.grid, position, v_bits);
    }
    if (p.has(kSecond)) load(p.second, p.grid, position, y_bits);
    if (p.has(kThreshold)) bound = p.threshold[position.sample * p.threshold_stride];
    if (p.depth == 1) load_past(p, position, past_bits, [](int) { return 0; });
    if (index < 0 || index >= p.num_rows) {
      if constexpr (!kInPlace) store_nan<1>(p, position);
      return;
    }
    const Row row = load_row(p.rows, index);
    if (p.depth > 1) {
      load_past(p, position, past_bits, [&](int k) { return past_slot(row, k, p.depth); });
    }

    Vec4 x[1], out[1], noise[1], y[1], past[kDeepest][1];
    convert(p.state.before(), x_bits, x);
    convert_output(p.out, out_bits, out);
    if (p.has(kGuide)) {
      Vec4 out2[1];
      convert_output(p.out2, out2_bits, out2);
      each([&](int j) { out[0].v[j] = guided(out[0].v[j], out2[0].v[j], row); });
    }
    if constexpr (kNoise == Noise::input) convert(p.noise, noise_bits, noise);
    if constexpr (kNoise == Noise::generated) generate_noise(key, index, position, noise);
    if constexpr (kNoise != Noise::none) {
      if (p.has(kLearned)) {
        Vec4 v[1];
        convert_output(p.log_variance, v_bits, v);
        each([&](int j) { noise[0].v[j] = scale_noise(noise[0].v[j], v[0].v[j], row); });
      }
    }
    convert(p.second, y_bits, y);
    DDPM_UNROLL
    for (int k = 0; k < kDeepest; ++k) convert(p.history, past_bits[k], past[k]);
    const Vec4 x0 = predicted(p, row, x[0], out[0], bound);

    // The sums read x, y and the past values from before the step.
    Vec4 next[1];
    each([&](int j) { next[0].v[j] = step_mean<false>(x[0].v[j], x0.v[j], out[0].v[j], row); });
    if (p.has(kRawOut)) add(row.Xo, out[0], next[0]);
    if (p.has(kSecond)) add(row.Xy, y[0], next[0]);
    add_past(p, row, past, next[0], [](const Row& r, int k) { return r.history_coef(k); });
    if constexpr (kNoise != Noise::none) add(row.S, noise[0], next[0]);
    if (p.has(kSecond)) {
      Vec4 sum[1];
      each([&](int j) { sum[0].v[j] = fma(row.Yx0, x0.v[j], row.Yx * x[0].v[j]); });
      add(row.Yy, y[0], sum[0]);
      add_past(p, row, past, sum[0], [](const Row& r, int k) { return r.history_coef_second(k); });
      store(p.second, p.grid, position, sum);
    }
    if (p.has(kPush) && row.push != 0.0f) {
      Vec4 pushed[1];
      each([&](int j) { pushed[0].v[j] = fma(row.Hv, x0.v[j], row.Hx * x[0].v[j]); });
      if (p.has(kPushOut)) add(row.Ho, out[0], pushed[0]);
      store(p.history, p.grid, position, pushed, past_slot(row, 0, p.depth) * p.slot_bytes);
    }
    store_state(p, position, row, x0, next);
  }

  static DDPM_HD void add(float coefficient, const Vec4& term, Vec4& sum) {
    each([&](int j) { sum.v[j] = fma(coefficient, term.v[j], sum.v[j]); });
  }

  template <class Coefficient>
  static DDPM_HD void add_past(const Params& p, const Row& row, const Vec4 (&past)[kDeepest][1],
                               Vec4& sum, Coefficient coefficient) {
    DDPM_UNROLL
    for (int k = 1; k <= kDeepest; ++k) {
      if (p.has_past(k)) add(coefficient(row, k), past[k - 1][0], sum);
    }
  }

  static DDPM_HD Vec4 predicted(const Params& p, const Row& row, const Vec4& x, const Vec4& out,
                                float bound) {
    Vec4 x0;
    each([&](int j) { x0.v[j] = predict_x0(x.v[j], out.v[j], row); });
    if (p.has(kThreshold)) {
      each([&](int j) { x0.v[j] = threshold(x0.v[j], bound); });
    } else if (p.has(kClip)) {
      each([&](int j) { x0.v[j] = clip(x0.v[j], row.clip); });
    }
    return x0;
  }

  static DDPM_HD void store_state(const Params& p, const Position& position, const Row& row,
                                  const Vec4& x0, Vec4 (&next)[1]) {
    store(p.state.x, p.grid, position, next);
    if (p.pred_x0.data) {
      const Vec4 vec4s[1] = {x0};
      store(p.pred_x0, p.grid, position, vec4s);
    }
    if (!kInPlace || !p.model_input.data) return;
    if (p.has(kScaleIn)) each([&](int j) { next[0].v[j] = row.Cin * next[0].v[j]; });
    store(p.model_input, p.grid, position, next);
  }
};

}  // namespace ddpm
