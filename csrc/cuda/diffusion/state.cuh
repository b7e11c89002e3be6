// The state of a step: one tensor that is updated in place, or a source and a destination.
//
// These are two variants rather than a run-time branch: in place, the offsets of a strided state
// are computed only once.
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

// Result of a functional step for a sample whose step is outside the table.
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
