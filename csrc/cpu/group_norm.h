// GroupNorm with optional sums before it and SiLU after it.
//
// The work is divided into slabs: some whole groups of one image. One thread processes a whole
// slab, so that the bits do not depend on the number of threads. The values of a slab are rows, one
// per pixel, processed kNormRows at a time. They are used in place, or gathered and converted: once
// if the slab is small enough to be cached, otherwise again in each pass.
//
// Included once per instruction set, inside namespace ddpm::DDPM_ISA (see kernels.inl).

constexpr int64_t kNormRows = 64;  // most pixels summed in the dtype of the arithmetic

// Per-channel values. Rows are summed into `part`, and parts into `sum`.
template <class R>
struct NormChannels {
  R *part, *vector, *mean, *gain, *offset;
  double* sum;
};

template <class R>
struct NormRows {
  R* data;
  int64_t stride;  // elements between rows
};

template <class R>
struct NormSlab {
  const GroupNormArgs& a;
  NormChannels<R> c;
  int64_t sample, first, channels;
  R* cached;  // [pixels, channels] if it fits, otherwise null
  R* block;   // max(NormSlabs::kBlock, channels) values

  int64_t pixels() const { return a.pixels(); }
  // Pixels processed at a time.
  int64_t step() const {
    const int64_t rows = NormSlabs::kBlock / channels;
    return rows < kNormRows ? (rows < 1 ? 1 : rows) : kNormRows;
  }
};

// Calls f(row of the buffer, offset in the map) for the pixels first .. first + count - 1.
template <class F>
DDPM_HD void over_pixels(const Map& map, int64_t width, int64_t first, int64_t count, F f) {
  int64_t y = first / width, x = first - y * width;
  for (int64_t i = 0; i < count; ++i) {
    f(i, y * map.row + x * map.column);
    if (++x == width) {
      x = 0;
      ++y;
    }
  }
}

DDPM_HD float widened(half_t v) {
  return to_float(v);
}
DDPM_HD float widened(bfloat16_t v) {
  return to_float(v);
}
template <class R>
DDPM_HD R widened(R v) {
  return v;
}
DDPM_HD void narrow(float v, half_t* to) {
  *to = to_half(v);
}
DDPM_HD void narrow(float v, bfloat16_t* to) {
  *to = to_bfloat16(v);
}
template <class R>
DDPM_HD void narrow(R v, R* to) {
  *to = v;
}

// Contiguous values: converted to the dtype of the arithmetic (or added), and back.
template <bool kAdd, class T, class R>
DDPM_HD void widen_row(const T* from, int64_t count, R* to) {
#pragma GCC ivdep
  for (int64_t c = 0; c < count; ++c) to[c] = kAdd ? to[c] + widened(from[c]) : widened(from[c]);
}
template <class T, class R>
DDPM_HD void narrow_row(const R* from, int64_t count, T* to) {
#pragma GCC ivdep
  for (int64_t c = 0; c < count; ++c) narrow(from[c], to + c);
}

#if defined(DDPM_F16C)  // the instruction set has conversions
// Eight values at a time by the conversion instruction, which gives the same results.
typedef float Float32x8 __attribute__((vector_size(32)));
typedef short Float16x8 __attribute__((vector_size(16)));
constexpr int kToNearestEven = 0;

template <bool kAdd>
DDPM_HD void widen_row(const half_t* from, int64_t count, float* to) {
  int64_t c = 0;
  for (; c + 8 <= count; c += 8) {
    Float16x8 bits;
    __builtin_memcpy(&bits, from + c, sizeof bits);
    Float32x8 values = __builtin_ia32_vcvtph2ps256(bits);
    if constexpr (kAdd) {
      Float32x8 before;
      __builtin_memcpy(&before, to + c, sizeof before);
      values = before + values;
    }
    __builtin_memcpy(to + c, &values, sizeof values);
  }
  widen_row<kAdd, half_t, float>(from + c, count - c, to + c);
}
DDPM_HD void narrow_row(const float* from, int64_t count, half_t* to) {
  int64_t c = 0;
  for (; c + 8 <= count; c += 8) {
    Float32x8 values;
    __builtin_memcpy(&values, from + c, sizeof values);
    const Float16x8 bits = __builtin_ia32_vcvtps2ph256(values, kToNearestEven);
    __builtin_memcpy(to + c, &bits, sizeof bits);
  }
  narrow_row<half_t, float>(from + c, count - c, to + c);
}
#endif

// Copies channels [first, first + channels) of some pixels of one map into rows, or adds them.
template <bool kAdd, class T, class R>
void gather_map(const Map& map, int64_t width, int64_t sample, int64_t first, int64_t channels,
                int64_t pixel, int64_t count, const NormRows<R>& rows) {
  const T* from = static_cast<const T*>(map.data) + sample * map.sample + first * map.channel;
  if (map.channel == 1) {
    over_pixels(map, width, pixel, count, [&](int64_t i, int64_t at) {
      widen_row<kAdd>(from + at, channels, rows.data + i * rows.stride);
    });
    return;
  }
  // Channels outermost: in this layout, neighbouring pixels are adjacent.
  for (int64_t c = 0; c < channels; ++c) {
    over_pixels(map, width, pixel, count, [&](int64_t i, int64_t at) {
      R& to = rows.data[i * rows.stride + c];
      const R value = widened(from[at + c * map.channel]);
      to = kAdd ? to + value : value;
    });
  }
}

template <class T, class R>
void scatter_map(const Map& map, int64_t width, int64_t sample, int64_t first, int64_t channels,
                 int64_t pixel, int64_t count, const NormRows<R>& rows) {
  T* to = static_cast<T*>(map.data) + sample * map.sample + first * map.channel;
  if (map.channel == 1) {
    over_pixels(map, width, pixel, count, [&](int64_t i, int64_t at) {
      narrow_row(rows.data + i * rows.stride, channels, to + at);
    });
    return;
  }
  for (int64_t c = 0; c < channels; ++c) {
    over_pixels(map, width, pixel, count, [&](int64_t i, int64_t at) {
      narrow(rows.data[i * rows.stride + c], to + at + c * map.channel);
    });
  }
}

// Sums the maps and the vector for some pixels of the slab.
template <class T, class R>
void gather_slab(const NormSlab<R>& s, int64_t pixel, int64_t count, const NormRows<R>& rows) {
  const GroupNormArgs& a = s.a;
  const int64_t end = s.first + s.channels;
  const int64_t x_count = s.first >= a.first ? 0 : (end < a.first ? end : a.first) - s.first;
  if (x_count > 0) {
    gather_map<false, T>(a.x, a.width, s.sample, s.first, x_count, pixel, count, rows);
  }
  if (x_count < s.channels) {
    const NormRows<R> remainder{rows.data + x_count, rows.stride};
    gather_map<false, T>(a.x2, a.width, s.sample, s.first + x_count - a.first, s.channels - x_count,
                         pixel, count, remainder);
  }
  if (a.residual.data) {
    gather_map<true, T>(a.residual, a.width, s.sample, s.first, s.channels, pixel, count, rows);
  }
  if (a.vector.data) {
    for (int64_t i = 0; i < count; ++i) {
      R* row = rows.data + i * rows.stride;
#pragma GCC ivdep
      for (int64_t c = 0; c < s.channels; ++c) row[c] += s.c.vector[c];
    }
  }
}

// True if the rows of x can be used in place: nothing is converted or added.
template <class T, class R>
bool used_in_place(const NormSlab<R>& s) {
  const GroupNormArgs& a = s.a;
  const bool alone = !a.residual.data && !a.vector.data && s.first + s.channels <= a.first;
  return sizeof(T) == sizeof(R) && alone && a.x.channel == 1 && a.x.row == a.width * a.x.column;
}

template <class R>
NormRows<R> rows_of(const NormSlab<R>& s, const Map& map, int64_t pixel) {
  return {static_cast<R*>(map.data) + s.sample * map.sample + s.first + pixel * map.column,
          map.column};
}

// Calls f(rows, pixel, count) for the whole slab, in blocks of at most kNormRows.
template <class T, class R, class F>
DDPM_HD void over_rows(const NormSlab<R>& s, bool first_pass, F f) {
  const bool in_place = used_in_place<T>(s);
  const int64_t step = s.step();
  for (int64_t pixel = 0; pixel < s.pixels(); pixel += step) {
    const int64_t left = s.pixels() - pixel, count = left < step ? left : step;
    if (in_place) {
      f(rows_of(s, s.a.x, pixel), pixel, count);
      continue;
    }
    R* to = s.cached ? s.cached + pixel * s.channels : s.block;
    const NormRows<R> rows{to, s.channels};
    if (first_pass || !s.cached) gather_slab<T>(s, pixel, count, rows);
    f(rows, pixel, count);
  }
}

// Sets sum[c] to the sum of term(value, c) over all rows of the slab.
template <class T, class R, class Term>
DDPM_HD void sum_rows(const NormSlab<R>& s, bool first_pass, Term term) {
  const int64_t channels = s.channels;
  double* sum = s.c.sum;
  R* part = s.c.part;
  for (int64_t c = 0; c < channels; ++c) sum[c] = 0;
  over_rows<T>(s, first_pass, [&](const NormRows<R>& rows, int64_t, int64_t count) {
    for (int64_t c = 0; c < channels; ++c) part[c] = 0;
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
      const R* r0 = rows.data + i * rows.stride;
      const R* r1 = r0 + rows.stride;
      const R* r2 = r1 + rows.stride;
      const R* r3 = r2 + rows.stride;
#pragma GCC ivdep
      for (int64_t c = 0; c < channels; ++c) {
        part[c] += (term(r0[c], c) + term(r1[c], c)) + (term(r2[c], c) + term(r3[c], c));
      }
    }
    for (; i < count; ++i) {
      const R* r = rows.data + i * rows.stride;
#pragma GCC ivdep
      for (int64_t c = 0; c < channels; ++c) part[c] += term(r[c], c);
    }
    for (int64_t c = 0; c < channels; ++c) sum[c] += static_cast<double>(part[c]);
  });
}

// Calls use(channel, mean over its group) with the sums of sum_rows.
template <class R, class Use>
DDPM_HD void over_groups(const NormSlab<R>& s, Use use) {
  const int64_t size = s.a.group_size();
  const double values = static_cast<double>(size) * static_cast<double>(s.pixels());
  for (int64_t first = 0; first < s.channels; first += size) {
    double total = 0;
    for (int64_t c = first; c < first + size; ++c) total += s.c.sum[c];
    for (int64_t c = first; c < first + size; ++c) use(c, total / values);
  }
}

template <bool kSilu, class R>
void apply_rows(const NormChannels<R>& c, int64_t channels, int64_t count, const NormRows<R>& rows,
                const NormRows<R>& to) {
  for (int64_t i = 0; i < count; ++i) {
    const R* from = rows.data + i * rows.stride;
    R* out = to.data + i * to.stride;
#pragma GCC ivdep
    for (int64_t k = 0; k < channels; ++k) {
      const R y = (from[k] - c.mean[k]) * c.gain[k] + c.offset[k];
      out[k] = kSilu ? silu(y) : y;
    }
  }
}

template <class R>
void load_channels(const NormSlab<R>& s) {
  const GroupNormArgs& a = s.a;
  const int64_t row = a.row ? a.row[s.sample * a.row_stride] : 0;
  const R nan = static_cast<R>(__builtin_nanf(""));
  const auto entry = [&](const SampleTable& table, int64_t column) {
    const bool inside = row >= 0 && row < table.rows;
    return inside ? static_cast<const R*>(table.data)[row * table.stride + column] : nan;
  };
  const auto parameter = [&](const void* from, int64_t c) {
    switch (a.parameters) {
      case DType::f16:
        return static_cast<R>(to_float(static_cast<const half_t*>(from)[c]));
      case DType::bf16:
        return static_cast<R>(to_float(static_cast<const bfloat16_t*>(from)[c]));
      case DType::f32:
        return static_cast<R>(static_cast<const float*>(from)[c]);
      default:
        return static_cast<R>(static_cast<const double*>(from)[c]);
    }
  };
  for (int64_t c = 0; c < s.channels; ++c) {
    const int64_t at = s.first + c;
    Affine<R> affine{parameter(a.weight, at), parameter(a.bias, at)};
    if (a.modulation.data) {
      affine = modulated(affine.gain, affine.offset, entry(a.modulation, at),
                         entry(a.modulation, a.channels() + at));
    }
    s.c.gain[c] = affine.gain;
    s.c.offset[c] = affine.offset;
    s.c.vector[c] = a.vector.data ? entry(a.vector, at) : R(0);
  }
}

template <class T, class R>
void norm_slab(const NormSlab<R>& s) {
  const GroupNormArgs& a = s.a;
  const NormChannels<R>& c = s.c;
  load_channels(s);
  sum_rows<T>(s, true, [](R v, int64_t) { return v; });
  over_groups(s, [&](int64_t k, double mean) { c.mean[k] = static_cast<R>(mean); });
  const R* mean = c.mean;
  sum_rows<T>(s, false, [=](R v, int64_t k) { return (v - mean[k]) * (v - mean[k]); });
  over_groups(s, [&](int64_t k, double variance) {
    c.gain[k] *= static_cast<R>(1.0 / __builtin_sqrt(variance + a.eps));
  });
  const bool out_in_place =
      sizeof(T) == sizeof(R) && a.out.channel == 1 && a.out.row == a.width * a.out.column;
  over_rows<T>(s, false, [&](const NormRows<R>& rows, int64_t pixel, int64_t count) {
    if (a.total.data) {
      scatter_map<T>(a.total, a.width, s.sample, s.first, s.channels, pixel, count, rows);
    }
    const NormRows<R> scratch{s.cached ? s.cached + pixel * s.channels : s.block, s.channels};
    const NormRows<R> to = out_in_place ? rows_of(s, a.out, pixel) : scratch;
    a.silu ? apply_rows<true>(c, s.channels, count, rows, to)
           : apply_rows<false>(c, s.channels, count, rows, to);
    if (out_in_place) return;
    scatter_map<T>(a.out, a.width, s.sample, s.first, s.channels, pixel, count, to);
  });
}

template <class T, class R>
void group_norm_slabs(const GroupNormArgs& a, int64_t begin, int64_t end, void* workspace) {
  const NormSlabs slabs(a);
  char* next = static_cast<char*>(workspace);
  const auto take = [&](auto*& array, int64_t count) {
    array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(next);
    next += NormSlabs::padded(count * static_cast<int64_t>(sizeof *array));
  };
  NormChannels<R> c;
  take(c.part, slabs.channels);
  take(c.vector, slabs.channels);
  take(c.mean, slabs.channels);
  take(c.gain, slabs.channels);
  take(c.offset, slabs.channels);
  take(c.sum, slabs.channels);
  R* cached = nullptr;
  R* block = nullptr;
  take(block, slabs.block());
  if (slabs.cached) take(cached, slabs.channels * a.pixels());
  for (int64_t work = begin; work < end; ++work) {
    const int64_t sample = work / slabs.per_sample;
    const int64_t first = (work - sample * slabs.per_sample) * slabs.channels;
    const int64_t left = a.channels() - first;
    const int64_t count = left < slabs.channels ? left : slabs.channels;
    norm_slab<T>(NormSlab<R>{a, c, sample, first, count, cached, block});
  }
}

inline void group_norm_any(const GroupNormArgs& a, int64_t begin, int64_t end, void* workspace) {
  switch (a.dtype) {
    case DType::f16:
      return group_norm_slabs<half_t, float>(a, begin, end, workspace);
    case DType::bf16:
      return group_norm_slabs<bfloat16_t, float>(a, begin, end, workspace);
    case DType::f32:
      return group_norm_slabs<float, float>(a, begin, end, workspace);
    case DType::f64:
      return group_norm_slabs<double, double>(a, begin, end, workspace);
  }
}
