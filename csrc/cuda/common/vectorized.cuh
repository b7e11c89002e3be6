// Loads and stores of Vec4s, for a tensor of any dtype and layout.
//
// A load returns raw bits, and the conversion is a second call, so that the loads of all tensors
// are issued before the first one is needed. The dtype is tested at run time, once for all Vec4s of
// a thread; all threads take the same branch.
#pragma once

#include <type_traits>

#include "core/half.h"
#include "core/tensor_view.h"
#include "cuda/common/grid.cuh"

namespace ddpm {

// Four consecutive elements.
struct Vec4 {
  float v[4];
};

// A Vec4 before the conversion: packed for a VectorizedTensor, one element per word for a View.
struct Bits {
  uint32_t w[4];
};

struct __attribute__((may_alias, aligned(16))) Vector16 {
  uint32_t w[4];
};
struct __attribute__((may_alias, aligned(8))) Vector8 {
  uint32_t w[2];
};

// A tensor in which every Vec4 is one aligned vector in memory.
struct VectorizedTensor {
  char* data;
  int64_t sample_bytes;
  uint32_t vector_bytes;  // 16, or 8 for 16-bit types
  DType dtype;
};

template <class Tensor>
constexpr int kVec4s = std::is_same_v<Tensor, View> ? 1 : 2;  // per thread

template <class Tensor>
using BlocksFor =
    std::conditional_t<std::is_same_v<Tensor, View>, Flat, BlocksOfSamples<kVec4s<Tensor>>>;

inline uint32_t vector_bytes_of(DType dtype) {
  return dtype == DType::f32 ? 16 : 8;
}

inline bool is_vectorizable(const View& view, int64_t samples, int64_t elements) {
  return view.linear && elements % 4 == 0 && (samples < 2 || view.sample_stride % 4 == 0) &&
         reinterpret_cast<uintptr_t>(view.data) % vector_bytes_of(view.dtype) == 0;
}

template <class Tensor>
Tensor tensor_of(const View& view) {
  if constexpr (std::is_same_v<Tensor, View>) {
    return view;
  } else {
    const uint32_t vector = vector_bytes_of(view.dtype);
    return {static_cast<char*>(view.data), view.sample_stride * (vector / 4), vector, view.dtype};
  }
}

DDPM_HD float to_float(DType dtype, uint32_t bits) {
  const uint16_t low = static_cast<uint16_t>(bits);
  return dtype == DType::f16 ? to_float(half_t{low}) : to_float(bfloat16_t{low});
}

DDPM_HD uint32_t to_bits(DType dtype, float value) {
  return dtype == DType::f16 ? to_half(value).bits : to_bfloat16(value).bits;
}

// Rounds the values to a dtype.
template <int kN>
DDPM_HD void round_to(DType dtype, Vec4 (&vec4s)[kN]) {
  if (dtype == DType::f32) return;
  DDPM_UNROLL
  for (int i = 0; i < kN; ++i) {
    DDPM_UNROLL
    for (float& v : vec4s[i].v) v = to_float(dtype, to_bits(dtype, v));
  }
}

DDPM_HD Bits unpacked(const Vector16& vector) {
  return {{vector.w[0], vector.w[1], vector.w[2], vector.w[3]}};
}
DDPM_HD Bits unpacked(const Vector8& vector) {
  return {{vector.w[0], vector.w[1], 0, 0}};
}

// bytes_on, here and below: offset in bytes, for a slot of a history.
DDPM_HD char* vector_at(const VectorizedTensor& tensor, const Position& position,
                        int64_t bytes_on) {
  return tensor.data + bytes_on + position.sample * tensor.sample_bytes +
         static_cast<uint64_t>(position.first) * tensor.vector_bytes;
}

template <int kN>
DDPM_HD void load(const VectorizedTensor& tensor, const Grid& grid, const Position& position,
                  Bits (&bits)[kN], int64_t bytes_on = 0) {
  const char* from = vector_at(tensor, position, bytes_on);
  if (tensor.dtype == DType::f32) {
    DDPM_UNROLL
    for (int i = 0; i < kN; ++i) {
      if (!grid.has(position, i)) continue;
      bits[i] = unpacked(reinterpret_cast<const Vector16*>(from)[i * kThreads]);
    }
  } else {
    DDPM_UNROLL
    for (int i = 0; i < kN; ++i) {
      if (!grid.has(position, i)) continue;
      bits[i] = unpacked(reinterpret_cast<const Vector8*>(from)[i * kThreads]);
    }
  }
}

template <int kN>
DDPM_HD void convert(const VectorizedTensor& tensor, const Bits (&bits)[kN], Vec4 (&vec4s)[kN]) {
  if (tensor.dtype == DType::f32) {
    DDPM_UNROLL
    for (int i = 0; i < kN; ++i) {
      DDPM_UNROLL
      for (int j = 0; j < 4; ++j) vec4s[i].v[j] = float_of(bits[i].w[j]);
    }
  } else {
    DDPM_UNROLL
    for (int i = 0; i < kN; ++i) {
      DDPM_UNROLL
      for (int j = 0; j < 4; ++j) {
        vec4s[i].v[j] = to_float(tensor.dtype, bits[i].w[j / 2] >> (16 * (j % 2)));
      }
    }
  }
}

template <int kN>
DDPM_HD void store(const VectorizedTensor& tensor, const Grid& grid, const Position& position,
                   const Vec4 (&vec4s)[kN], int64_t bytes_on = 0) {
  char* to = vector_at(tensor, position, bytes_on);
  const DType dtype = tensor.dtype;
  if (dtype == DType::f32) {
    DDPM_UNROLL
    for (int i = 0; i < kN; ++i) {
      const float* v = vec4s[i].v;
      if (!grid.has(position, i)) continue;
      reinterpret_cast<Vector16*>(to)[i * kThreads] = {
          {bits_of(v[0]), bits_of(v[1]), bits_of(v[2]), bits_of(v[3])}};
    }
  } else {
    DDPM_UNROLL
    for (int i = 0; i < kN; ++i) {
      const float* v = vec4s[i].v;
      if (!grid.has(position, i)) continue;
      reinterpret_cast<Vector8*>(to)[i * kThreads] = {
          {to_bits(dtype, v[0]) | to_bits(dtype, v[1]) << 16,
           to_bits(dtype, v[2]) | to_bits(dtype, v[3]) << 16}};
    }
  }
}

// The bits of element `at`.
DDPM_HD uint32_t word_at(const char* data, DType dtype, int64_t at) {
  return dtype == DType::f32 ? bits_of(reinterpret_cast<const float*>(data)[at])
                             : reinterpret_cast<const uint16_t*>(data)[at];
}

// Offset of element `index` of all dimensions but the innermost.
DDPM_HD int64_t outer_offset(const View& view, int64_t index) {
  int64_t offset = 0;
  for (int d = view.ndim - 2; d > 0; --d) {
    const int64_t quotient = index / view.sizes[d];
    offset += (index - quotient * view.sizes[d]) * view.strides[d];
    index = quotient;
  }
  return view.ndim > 1 ? offset + index * view.strides[0] : 0;
}

// Converts a Vec4 that was loaded with one element per word.
DDPM_HD void convert_unpacked(DType dtype, const Bits& bits, Vec4& vec4) {
  DDPM_UNROLL
  for (int j = 0; j < 4; ++j) {
    vec4.v[j] = dtype == DType::f32 ? float_of(bits.w[j]) : to_float(dtype, bits.w[j]);
  }
}

struct Offsets {
  int64_t at[4];
};

// offset_in_sample of the four elements of a Vec4, with one division by the innermost size.
DDPM_HD Offsets offsets_of(const View& view, int64_t first) {
  Offsets offsets;
  if (view.linear) {
    DDPM_UNROLL
    for (int j = 0; j < 4; ++j) offsets.at[j] = first + j;
    return offsets;
  }
  const int64_t size = view.sizes[view.ndim - 1];
  const int64_t stride = view.strides[view.ndim - 1];
  int64_t outer = first / size;
  int64_t inner = first - outer * size;
  int64_t offset = outer_offset(view, outer);
  DDPM_UNROLL
  for (int j = 0; j < 4; ++j) {
    offsets.at[j] = offset + inner * stride;
    if (++inner == size) {
      inner = 0;
      offset = outer_offset(view, ++outer);
    }
  }
  return offsets;
}

DDPM_HD void load(const View& view, const Grid& grid, const Position& position, Bits (&bits)[1],
                  int64_t bytes_on = 0) {
  const int64_t first = int64_t{4} * position.first;
  if (first >= grid.elements) return;
  const Offsets offsets = offsets_of(view, first);
  const int64_t sample = position.sample * view.sample_stride;
  const char* data = static_cast<const char*>(view.data) + bytes_on;
  DDPM_UNROLL
  for (int j = 0; j < 4; ++j) {
    if (first + j >= grid.elements) continue;
    bits[0].w[j] = word_at(data, view.dtype, sample + offsets.at[j]);
  }
}

DDPM_HD void convert(const View& view, const Bits (&bits)[1], Vec4 (&vec4s)[1]) {
  convert_unpacked(view.dtype, bits[0], vec4s[0]);
}

DDPM_HD void store(const View& view, const Grid& grid, const Position& position,
                   const Vec4 (&vec4s)[1], int64_t bytes_on = 0) {
  const int64_t first = int64_t{4} * position.first;
  if (first >= grid.elements) return;
  const Offsets offsets = offsets_of(view, first);
  const int64_t sample = position.sample * view.sample_stride;
  char* data = static_cast<char*>(view.data) + bytes_on;
  DDPM_UNROLL
  for (int j = 0; j < 4; ++j) {
    if (first + j >= grid.elements) continue;
    const int64_t at = sample + offsets.at[j];
    if (view.dtype == DType::f32) {
      reinterpret_cast<float*>(data)[at] = vec4s[0].v[j];
    } else {
      reinterpret_cast<uint16_t*>(data)[at] =
          static_cast<uint16_t>(to_bits(view.dtype, vec4s[0].v[j]));
    }
  }
}

}  // namespace ddpm
