// Copies of one sample's elements between tensors of any dtype and layout and the buffers of the
// arithmetic loops. A tensor that already has the layout and dtype of a buffer is used in place.
//
// Included once per instruction set, inside namespace ddpm::DDPM_ISA (see kernels.inl).

struct Block {
  int64_t sample, first, count;
};

DDPM_HD Block block_at(int64_t work, int64_t per_sample, int64_t elements) {
  const int64_t sample = work / per_sample;
  const int64_t first = (work - sample * per_sample) * kBlock;
  const int64_t left = elements - first;
  return {sample, first, left < kBlock ? left : kBlock};
}

template <class R>
constexpr DType kNative = sizeof(R) == 8 ? DType::f64 : DType::f32;

template <class R>
DDPM_HD R* sample_pointer(const View& view, int64_t sample) {
  return static_cast<R*>(view.data) + sample * view.sample_stride;
}

// Calls f(i, offset) for the elements first + i of a sample, i < count.
template <class F>
DDPM_HD void walk(const View& view, int64_t first, int64_t count, F f) {
  if (view.linear) {
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) f(i, first + i);
    return;
  }
  if (count == 0) return;  // sizes may be 0
  const int last = view.ndim - 1;
  int64_t index[kMaxDims];
  int64_t remainder = first;
  int64_t offset = 0;
  for (int d = last; d >= 0; --d) {
    index[d] = d > 0 ? remainder % view.sizes[d] : remainder;
    remainder = d > 0 ? remainder / view.sizes[d] : 0;
    offset += index[d] * view.strides[d];
  }
  const int64_t stride = view.strides[last];
  for (int64_t i = 0; i < count;) {
    const int64_t left = view.sizes[last] - index[last];
    const int64_t run = left < count - i ? left : count - i;
#pragma GCC ivdep
    for (int64_t j = 0; j < run; ++j) f(i + j, offset + j * stride);
    i += run;
    index[last] += run;
    offset += run * stride;
    for (int d = last; d > 0 && index[d] == view.sizes[d]; --d) {
      offset += view.strides[d - 1] - index[d] * view.strides[d];
      index[d] = 0;
      ++index[d - 1];
    }
  }
}

template <class R>
DDPM_HD bool is_buffer(const View& view) {
  return view.linear && view.dtype == kNative<R>;
}

#include "cpu/triples.h"

// Copies [pixels, kSize] out of [pixels, stride], with dense channels. All pixels but the last are
// copied four values at a time: the next pixel overwrites the fourth value, and the last pixel
// bounds what is read.
template <int kSize, class T>
DDPM_HD void pack_pixels(const T* from, int64_t stride, int64_t pixels, T* to) {
  int64_t p = 0;
#if defined(DDPM_PERMUTES)
  if constexpr (kSize == 3 && std::is_same_v<T, float>) {
    constexpr int kPixels = kTriples / 3;
    for (; stride == 6 && p + kPixels <= pixels; p += kPixels)
      pack_triples(from + p * 6, to + p * 3);
  }
#endif
#pragma GCC unroll 4
  for (; p + 1 < pixels; ++p) __builtin_memcpy(to + p * kSize, from + p * stride, 4 * sizeof(T));
  if (p < pixels) __builtin_memcpy(to + p * kSize, from + p * stride, kSize * sizeof(T));
}

// Two dimensions with three or four dense elements in the inner one: some channels of a
// channels-last tensor, such as the output beside a learned variance.
DDPM_HD bool is_pixels(const View& view) {
  return view.ndim == 2 && view.strides[1] == 1 && view.strides[0] > 0 &&
         (view.sizes[1] == 3 || view.sizes[1] == 4);
}

template <class T>
void pack(const View& view, const T* from, int64_t first, int64_t count, T* to) {
  const int64_t size = view.sizes[1], stride = view.strides[0];
  int64_t pixel = first / size;
  int64_t channel = first - pixel * size;
  int64_t done = 0;
  const auto part_of_pixel = [&](int64_t end) {
    for (; channel < size && done < end; ++done, ++channel)
      to[done] = from[pixel * stride + channel];
  };
  if (channel > 0) {
    part_of_pixel(count);
    channel = 0;
    ++pixel;
  }
  const int64_t pixels = (count - done) / size;
  size == 3 ? pack_pixels<3>(from + pixel * stride, stride, pixels, to + done)
            : pack_pixels<4>(from + pixel * stride, stride, pixels, to + done);
  done += pixels * size;
  pixel += pixels;
  part_of_pixel(count);
}

template <class T, class R, class Convert>
DDPM_HD void gather_as(const View& view, int64_t sample, int64_t first, int64_t count, R* buffer,
                       Convert convert) {
  const T* from = sample_pointer<T>(view, sample);
  if (!is_pixels(view)) {
    walk(view, first, count, [=](int64_t i, int64_t at) { buffer[i] = convert(from[at]); });
  } else if constexpr (std::is_same_v<T, R>) {
    pack(view, from, first, count, buffer);
  } else {
    T packed[kBlock];
    pack(view, from, first, count, packed);
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) buffer[i] = convert(packed[i]);
  }
}

// Copies at most kBlock elements into `buffer`.
template <class R>
void gather(const View& view, int64_t sample, int64_t first, int64_t count, R* buffer) {
  switch (view.dtype) {
    case DType::f16:
      return gather_as<half_t>(view, sample, first, count, buffer,
                               [](half_t v) { return to_float(v); });
    case DType::bf16:
      return gather_as<bfloat16_t>(view, sample, first, count, buffer,
                                   [](bfloat16_t v) { return to_float(v); });
    case DType::f32:
      return gather_as<float>(view, sample, first, count, buffer, [](float v) { return v; });
    case DType::f64:
      return gather_as<double>(view, sample, first, count, buffer,
                               [](double v) { return static_cast<R>(v); });
  }
}

template <class R>
void scatter(const View& view, int64_t sample, int64_t first, int64_t count, const R* buffer) {
  switch (view.dtype) {
    case DType::f16: {
      half_t* to = sample_pointer<half_t>(view, sample);
      walk(view, first, count,
           [=](int64_t i, int64_t at) { to[at] = to_half(static_cast<float>(buffer[i])); });
      break;
    }
    case DType::bf16: {
      bfloat16_t* to = sample_pointer<bfloat16_t>(view, sample);
      walk(view, first, count,
           [=](int64_t i, int64_t at) { to[at] = to_bfloat16(static_cast<float>(buffer[i])); });
      break;
    }
    case DType::f32: {
      float* to = sample_pointer<float>(view, sample);
      walk(view, first, count,
           [=](int64_t i, int64_t at) { to[at] = static_cast<float>(buffer[i]); });
      break;
    }
    case DType::f64: {
      double* to = sample_pointer<double>(view, sample);
      walk(view, first, count, [=](int64_t i, int64_t at) { to[at] = buffer[i]; });
      break;
    }
  }
}

// Elements to read: in place if the tensor is a buffer, otherwise gathered into `scratch`.
template <class R>
const R* read_block(const View& view, int64_t sample, int64_t first, int64_t count, R* scratch) {
  if (is_buffer<R>(view)) return sample_pointer<R>(view, sample) + first;
  gather(view, sample, first, count, scratch);
  return scratch;
}

// Destination of the results: the tensor itself, or `scratch`, which write_block scatters.
template <class R>
R* target_block(const View& view, int64_t sample, int64_t first, R* scratch) {
  return is_buffer<R>(view) ? sample_pointer<R>(view, sample) + first : scratch;
}

template <class R>
void write_block(const View& view, int64_t sample, int64_t first, int64_t count, const R* block) {
  if (!is_buffer<R>(view)) scatter(view, sample, first, count, block);
}

// Elements to update: in place, or gathered into `scratch`, which write_block scatters.
template <class R>
R* updated_block(const View& view, const Block& b, R* scratch) {
  R* block = target_block(view, b.sample, b.first, scratch);
  if (block == scratch) gather(view, b.sample, b.first, b.count, scratch);
  return block;
}
