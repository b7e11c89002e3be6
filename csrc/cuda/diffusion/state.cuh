// The state of a step: one tensor that is changed, or one that is read and another that is written.
//
// Two variants, not one that asks at run time: in place, where a state is not one straight piece of
// memory, its offsets are worked out once.
#pragma once

#include "core/args.h"
#include "cuda/common/vectorized.cuh"

namespace ddpm {

template <class Tensor, bool kInPlace>
struct State {
  Tensor x;

  static State of(const ReverseStepArgs& a) { return {tensor_of<Tensor>(a.x)}; }
  DDPM_HD const Tensor& before() const { return x; }
};

template <class Tensor>
struct State<Tensor, false> {
  Tensor x, source;

  static State of(const ReverseStepArgs& a) {
    return {tensor_of<Tensor>(a.x), tensor_of<Tensor>(a.source)};
  }
  DDPM_HD const Tensor& before() const { return source; }
};

// What a sample without a row is given where it has no state of its own to be left at.
template <int kN, class Params>
DDPM_HD void store_nan(const Params& p, const Position& position) {
  Vec4 nan[kN];
  DDPM_UNROLL
  for (Vec4& vec4 : nan) {
    DDPM_UNROLL
    for (float& v : vec4.v) v = __builtin_nanf("");
  }
  store(p.state.x, p.grid, position, nan);
  if (p.pred_x0.data) store(p.pred_x0, p.grid, position, nan);
}

}  // namespace ddpm
