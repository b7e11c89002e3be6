// Arithmetic of the fused updates for one element, shared by the CPU and the CUDA kernels.
// ddpm_fast/ops/triton/arithmetic.py has the same functions for Triton.
#pragma once

#include "core/exponential.h"
#include "core/row.h"

namespace ddpm {

// Eq. 4, Ho et al. 2020: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise.
template <class R>
DDPM_HD R q_sample(R x0, R noise, R signal_scale, R noise_scale) {
  return fma(signal_scale, x0, noise_scale * noise);
}

// Eq. 7, Ho et al. 2020: the mean of q(x_{t-1} | x_t, x_0).
template <class R>
DDPM_HD R q_posterior_mean(R x0, R x_t, R coef_x0, R coef_x_t) {
  return fma(coef_x0, x0, coef_x_t * x_t);
}

// Combines the model output with the output that guides it.
template <class R>
DDPM_HD R guided(R out, R out2, const Row<R>& row) {
  return fma(row.G1, out2, row.G0 * out);
}

// x0 from the model output for every prediction type: P x + Q out. Computed with the ratio Q / P
// where P is not 0: for small abar both terms are large and cancel, and rounding Q out would
// dominate the result.
template <class R>
DDPM_HD R predict_x0(R x, R out, const Row<R>& row) {
  const bool direct = row.P == R(0);
  const R sum = direct ? out : fma(row.ratio, out, x);
  return (direct ? row.Q : row.P) * sum;
}

// NaN passes: both comparisons are false for it. fmin and fmax would drop it.
template <class R>
DDPM_HD R clip(R value, R bound) {
  value = value < -bound ? -bound : value;
  return value > bound ? bound : value;
}

// Dynamic thresholding, Saharia et al. 2022.
template <class R>
DDPM_HD R threshold(R value, R bound) {
  return clip(value, bound) / bound;
}

// x' without its noise term.
template <bool kUsesOut, class R>
DDPM_HD R step_mean(R x, R x0, R out, const Row<R>& row) {
  R next = fma(row.Xx0, x0, row.Xx * x);
  if constexpr (kUsesOut) next = fma(row.Xo, out, next);
  return next;
}

template <class R>
DDPM_HD R add_noise(R mean, R noise, const Row<R>& row) {
  return fma(row.S, noise, mean);
}

// Logarithm of the noise scale for a learned variance: the output v interpolates between the
// logarithms of two variances (Nichol and Dhariwal 2021).
template <class R>
DDPM_HD R log_scale(R v, const Row<R>& row) {
  return fma(v, R(0.5) * (row.Lmax - row.Lmin), R(0.5) * row.Lmin);
}

template <class R>
DDPM_HD R scale_noise(R noise, R v, const Row<R>& row) {
  return exponential(log_scale(v, row)) * noise;
}

}  // namespace ddpm
