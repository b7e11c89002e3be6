// A model output in a vectorized kernel. It may be some channels of a channels-last tensor with
// more channels, such as the output beside a learned variance: then its pixels are not adjacent,
// and elements are loaded one by one.
#pragma once

#include "cuda/common/vectorized.cuh"

namespace ddpm {

struct OutputTensor {
  VectorizedTensor vectors;
  uint32_t channels;  // per pixel; 0 if the tensor is vectorized
  uint32_t gap;       // elements between two pixels
  uint32_t multiplier, shift;
};

template <class Tensor>
using OutputOf = std::conditional_t<std::is_same_v<Tensor, View>, View, OutputTensor>;

// Most elements of a sample, including the gaps.
constexpr int64_t kMostInPixels = int64_t{1} << 31;

// Two dimensions with the inner one dense, or one dimension with a stride: pixels of one channel.
inline bool in_pixels(const View& view, int64_t elements) {
  if (view.ndim < 1 || view.ndim > 2 || elements % 4 != 0) return false;
  if (view.ndim == 2 && view.strides[1] != 1) return false;
  const int64_t channels = view.ndim == 2 ? view.sizes[1] : 1;
  return view.strides[0] >= channels && view.sizes[0] * view.strides[0] < kMostInPixels;
}

template <class Output>
Output output_of(const View& view, int64_t samples, int64_t elements) {
  if constexpr (std::is_same_v<Output, View>) {
    return view;
  } else {
    Output output{tensor_of<VectorizedTensor>(view), 0, 0, 0, 0};
    if (view.data == nullptr || is_vectorizable(view, samples, elements)) return output;
    const int64_t channels = view.ndim == 2 ? view.sizes[1] : 1;
    output.channels = static_cast<uint32_t>(channels);
    output.gap = static_cast<uint32_t>(view.strides[0] - channels);
    // For e < 2^31, e / channels = (e * multiplier) >> shift: Granlund and Montgomery 1994.
    uint32_t log2 = 0;
    while ((int64_t{1} << log2) < channels) ++log2;
    output.shift = 31 + log2;
    output.multiplier = static_cast<uint32_t>((uint64_t{1} << output.shift) / output.channels + 1);
    return output;
  }
}

DDPM_HD void load_output(const View& view, const Grid& grid, const Position& position,
                         Bits (&bits)[1]) {
  load(view, grid, position, bits);
}
DDPM_HD void convert_output(const View& view, const Bits (&bits)[1], Vec4 (&vec4s)[1]) {
  convert(view, bits, vec4s);
}

DDPM_HD void load_output(const OutputTensor& output, const Grid& grid, const Position& position,
                         Bits (&bits)[1]) {
  if (output.channels == 0) {
    load(output.vectors, grid, position, bits);
    return;
  }
  if (!grid.has(position, 0)) return;
  const uint32_t first = 4 * position.first;
  const uint32_t pixel = static_cast<uint32_t>(mul_wide(first, output.multiplier) >> output.shift);
  uint32_t channel = first - pixel * output.channels;
  uint32_t at = first + pixel * output.gap;
  const char* sample = output.vectors.data + position.sample * output.vectors.sample_bytes;
  DDPM_UNROLL
  for (int j = 0; j < 4; ++j) {
    bits[0].w[j] = word_at(sample, output.vectors.dtype, at);
    const bool last = ++channel == output.channels;
    channel = last ? 0 : channel;
    at += last ? output.gap + 1 : 1;
  }
}

DDPM_HD void convert_output(const OutputTensor& output, const Bits (&bits)[1], Vec4 (&vec4s)[1]) {
  if (output.channels == 0) {
    convert(output.vectors, bits, vec4s);
  } else {
    convert_unpacked(output.vectors.dtype, bits[0], vec4s[0]);
  }
}

}  // namespace ddpm
