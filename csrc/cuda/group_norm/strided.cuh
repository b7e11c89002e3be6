// GroupNorm of maps with any strides, element by element: one block per group of an image reads its
// elements three times, for the mean, for the variance and for the result. The slow path, for maps
// that cannot be vectorized.
#pragma once

#include "cuda/group_norm/vectorized.cuh"

namespace ddpm {

constexpr uint32_t kStridedThreads = 256;
constexpr uint32_t kStridedWarps = kStridedThreads / 32;

struct StridedParams {
  int64_t samples, channels, first, pixels, width, group_size, elements;
  bool channel_fastest;  // neighbouring threads read neighbouring channels, otherwise pixels
  Map out, x, x2, residual, total;
  SampleTable vector, modulation;
  const int64_t* row;
  int64_t row_stride;
  const void* weight;
  const void* bias;
  bool wide_parameters;
  bool silu;
  float eps;
};

inline StridedParams strided_params(const GroupNormArgs& a) {
  return {a.samples,
          a.channels(),
          a.first,
          a.pixels(),
          a.width,
          a.group_size(),
          a.group_size() * a.pixels(),
          a.x.channel < a.x.column,
          a.out,
          a.x,
          a.x2,
          a.residual,
          a.total,
          a.vector,
          a.modulation,
          a.row,
          a.row_stride,
          a.weight,
          a.bias,
          a.parameters == DType::f32,
          a.silu,
          static_cast<float>(a.eps)};
}

struct Quotient {
  int64_t quotient, remainder;
};

// A 32-bit division if the operands allow it: a 64-bit one is many times slower.
DDPM_HD Quotient divided(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) {
    const uint32_t quotient = static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
    return {quotient, a - quotient * b};
  }
  const int64_t quotient = a / b;
  return {quotient, a - quotient * b};
}

template <class T>
struct StridedThread {
  NormPosition position;  // slab is the group
  float* shared;
  float sum, mean, scale;
  int64_t row;

  struct Element {
    int64_t channel, y, x;
  };

  // `position` and `shared` are set.
  DDPM_HD void begin(const StridedParams&) { mean = scale = 0.0f; }
  DDPM_HD void load_row(const StridedParams& p) {
    row = p.row == nullptr ? 0 : p.row[position.sample * p.row_stride];
  }

  DDPM_HD Element element(const StridedParams& p, int64_t index) const {
    const Quotient q = divided(index, p.channel_fastest ? p.group_size : p.pixels);
    const Quotient pixel = divided(p.channel_fastest ? q.quotient : q.remainder, p.width);
    const int64_t channel = p.channel_fastest ? q.remainder : q.quotient;
    return {position.slab * p.group_size + channel, pixel.quotient, pixel.remainder};
  }
  DDPM_HD T* at(const Map& map, const Element& e, int64_t channel) const {
    return static_cast<T*>(map.data) + position.sample * map.sample + channel * map.channel +
           e.y * map.row + e.x * map.column;
  }
  DDPM_HD float value(const StridedParams& p, const Element& e) const {
    const bool second = e.channel >= p.first;
    const T bits = second ? *at(p.x2, e, e.channel - p.first) : *at(p.x, e, e.channel);
    float h = Packed<T>::one(bits);
    if (p.residual.data != nullptr) h += Packed<T>::one(*at(p.residual, e, e.channel));
    return p.vector.data == nullptr ? h : h + vector_of(p, row, e.channel);
  }

  // Sums the values, or with kSquares their squared differences to the mean.
  template <bool kSquares>
  DDPM_HD void sums(const StridedParams& p) {
    sum = 0.0f;
    for (int64_t i = position.thread; i < p.elements; i += kStridedThreads) {
      const float h = value(p, element(p, i));
      sum = kSquares ? fma(h - mean, h - mean, sum) : sum + h;
    }
  }
  DDPM_HD void store_part(uint32_t pass) const {
    if (position.thread % 32 == 0) shared[pass * kStridedWarps + position.thread / 32] = sum;
  }
  DDPM_HD void finish(const StridedParams& p, uint32_t pass) {
    sum = 0.0f;
    for (uint32_t warp = 0; warp < kStridedWarps; ++warp) {
      sum += shared[pass * kStridedWarps + warp];
    }
    const float average = sum / static_cast<float>(p.elements);
    if (pass == 0) {
      mean = average;
    } else {
      scale = reciprocal_sqrt(average + p.eps);
    }
  }
  DDPM_HD void apply(const StridedParams& p) const {
    for (int64_t i = position.thread; i < p.elements; i += kStridedThreads) {
      const Element e = element(p, i);
      const float h = value(p, e);
      const Affine<float> affine = affine_of<T>(p, row, e.channel);
      const float y = fma(h - mean, scale * affine.gain, affine.offset);
      if (p.total.data != nullptr) *at(p.total, e, e.channel) = Packed<T>::rounded(h);
      *at(p.out, e, e.channel) = Packed<T>::rounded(p.silu ? silu(y) : y);
    }
  }
};

}  // namespace ddpm
