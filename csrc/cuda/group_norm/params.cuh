// Parameters of the kernels of group_norm_, and the constants of a channel.
#pragma once

#include "core/group_norm.h"
#include "cuda/common/packed.cuh"
#include "cuda/group_norm/plan.h"

namespace ddpm {

// A map that is accessed in 16-byte vectors.
struct VectorizedMap {
  char* data;
  int64_t sample_bytes, pixel_bytes;
};

// Parameters of the vectorized kernels.
struct NormParams {
  NormPlan plan;
  uint32_t pixels, group_size;
  int64_t samples, channels, first;  // channels of x
  VectorizedMap out, x, x2, residual, total;
  SampleTable vector, modulation;
  const int64_t* row;
  int64_t row_stride;
  const void* weight;
  const void* bias;
  bool wide_parameters;  // float32
  bool silu;
  float eps;
};

inline VectorizedMap vectors_of(const Map& map, const GroupNormArgs& a) {
  const int64_t bytes = element_bytes(a.dtype);
  const int64_t pixel = a.width == 1 ? map.row : map.column;
  return {static_cast<char*>(map.data), bytes * map.sample, bytes * pixel};
}

inline NormParams norm_params(const GroupNormArgs& a, const NormPlan& plan) {
  return {plan,
          static_cast<uint32_t>(a.pixels()),
          static_cast<uint32_t>(a.group_size()),
          a.samples,
          a.channels(),
          a.first,
          vectors_of(a.out, a),
          vectors_of(a.x, a),
          vectors_of(a.x2, a),
          vectors_of(a.residual, a),
          vectors_of(a.total, a),
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

// The row of a table for a sample, or null if it is out of range.
DDPM_HD const float* row_for(const SampleTable& table, int64_t row) {
  if (row < 0 || row >= table.rows) return nullptr;
  return static_cast<const float*>(table.data) + row * table.stride;
}

template <class T>
DDPM_HD float parameter(const void* from, bool wide, int64_t channel) {
  return wide ? static_cast<const float*>(from)[channel]
              : Packed<T>::one(static_cast<const T*>(from)[channel]);
}

// Weight, bias and modulation of a channel, combined into one gain and one offset.
template <class T, class Params>
DDPM_HD Affine<float> affine_of(const Params& p, int64_t row, int64_t channel) {
  const float weight = parameter<T>(p.weight, p.wide_parameters, channel);
  const float bias = parameter<T>(p.bias, p.wide_parameters, channel);
  if (p.modulation.data == nullptr) return {weight, bias};
  const float* table = row_for(p.modulation, row);
  if (table == nullptr) return {__builtin_nanf(""), __builtin_nanf("")};
  return modulated(weight, bias, table[channel], table[p.channels + channel]);
}

template <class Params>
DDPM_HD float vector_of(const Params& p, int64_t row, int64_t channel) {
  if (p.vector.data == nullptr) return 0.0f;
  const float* table = row_for(p.vector, row);
  return table == nullptr ? __builtin_nanf("") : table[channel];
}

// Position of a thread: sample, slab (or group), block of the cluster, thread of the block.
struct NormPosition {
  int64_t sample;
  uint32_t slab, rank, thread;
};

}  // namespace ddpm
