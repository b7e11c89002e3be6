// Blocks of one sample's elements between tensors of any type and layout and a buffer that the
// arithmetic loops run over. A tensor that already is such a buffer is used where it lies.
//
// Included once per instruction set, inside namespace ddpm::DDPM_ISA (see kernels.inl).

template <class R>
constexpr DType kNative = sizeof(R) == 8 ? DType::f64 : DType::f32;

template <class R>
DDPM_HD R* sample_pointer(const View& view, int64_t sample) {
  return static_cast<R*>(view.data) + sample * view.sample_stride;
}

// Calls body(i, offset) for the elements first + i of a sample, i < count.
template <class Body>
DDPM_HD void walk(const View& view, int64_t first, int64_t count, Body body) {
  if (view.linear) {
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) body(i, first + i);
    return;
  }
  if (count == 0) return;  // sizes may be 0
  const int last = view.ndim - 1;
  int64_t index[kMaxDims];
  int64_t rest = first;
  int64_t offset = 0;
  for (int d = last; d >= 0; --d) {
    index[d] = d > 0 ? rest % view.sizes[d] : rest;
    rest = d > 0 ? rest / view.sizes[d] : 0;
    offset += index[d] * view.strides[d];
  }
  const int64_t stride = view.strides[last];
  for (int64_t i = 0; i < count;) {
    const int64_t left = view.sizes[last] - index[last];
    const int64_t run = left < count - i ? left : count - i;
#pragma GCC ivdep
    for (int64_t j = 0; j < run; ++j) body(i + j, offset + j * stride);
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

template <class R>
void gather(const View& view, int64_t sample, int64_t first, int64_t count, R* buffer) {
  switch (view.dtype) {
    case DType::f16: {
      const half_t* from = sample_pointer<half_t>(view, sample);
      walk(view, first, count, [=](int64_t i, int64_t at) { buffer[i] = to_float(from[at]); });
      break;
    }
    case DType::bf16: {
      const bfloat16_t* from = sample_pointer<bfloat16_t>(view, sample);
      walk(view, first, count, [=](int64_t i, int64_t at) { buffer[i] = to_float(from[at]); });
      break;
    }
    case DType::f32: {
      const float* from = sample_pointer<float>(view, sample);
      walk(view, first, count, [=](int64_t i, int64_t at) { buffer[i] = from[at]; });
      break;
    }
    case DType::f64: {
      const double* from = sample_pointer<double>(view, sample);
      walk(view, first, count,
           [=](int64_t i, int64_t at) { buffer[i] = static_cast<R>(from[at]); });
      break;
    }
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

// The elements to read: in place where the tensor is a buffer, else gathered into `scratch`.
template <class R>
const R* read_block(const View& view, int64_t sample, int64_t first, int64_t count, R* scratch) {
  if (is_buffer<R>(view)) return sample_pointer<R>(view, sample) + first;
  gather(view, sample, first, count, scratch);
  return scratch;
}

// Where to compute what will be written: in place, or `scratch`, which write_block then scatters.
template <class R>
R* target_block(const View& view, int64_t sample, int64_t first, R* scratch) {
  return is_buffer<R>(view) ? sample_pointer<R>(view, sample) + first : scratch;
}

template <class R>
void write_block(const View& view, int64_t sample, int64_t first, int64_t count, const R* block) {
  if (!is_buffer<R>(view)) scatter(view, sample, first, count, block);
}
