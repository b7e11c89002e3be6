// A plain step with a learned variance, in float32: one fused loop over groups of elements that
// stay in registers, so that loads overlap with the exponentials.
//
// Included once per instruction set, inside namespace ddpm::DDPM_ISA (see kernels.inl).

// Elements of a group: few enough to stay in registers, and a multiple of every vector width.
constexpr int kGroup = 48;

// Elements of a part, whose buffers stay in the L1 cache: whole pixels of three channels, whole
// groups, and a multiple of what make_normals generates together.
constexpr int64_t kLearnedPart = 768;
static_assert(kBlock % kLearnedPart == 0 && kLearnedPart % (4 * kLanes) == 0);
static_assert(kLearnedPart % 3 == 0 && kLearnedPart % kGroup == 0);

struct LearnedScratch {
  alignas(64) float x[kLearnedPart], out[kLearnedPart], v[kLearnedPart], noise[kLearnedPart];
  alignas(64) float x0[kLearnedPart], spare[kLearnedPart], normals[kLearnedPart];
};

struct LearnedBlock {
  const float* x;
  const float* out;
  const float* v;
  const float* noise;
  float* next;  // may be x
  float* pred_x0;

  DDPM_HD LearnedBlock with(int64_t i, const float* new_out, const float* new_v) const {
    return {x + i, new_out, new_v, noise + i, next + i, pred_x0 ? pred_x0 + i : nullptr};
  }
  DDPM_HD LearnedBlock at(int64_t i) const { return with(i, out + i, v + i); }
};

// Computes the logarithms of the noise scales. Returns true if exponential_near_0 is enough for
// them, as in nearly every step of a chain.
DDPM_HD bool log_scales(const float* v, const Row<float>& row, float* sizes) {
  uint32_t largest = 0;  // a NaN is larger than any number
  for (int i = 0; i < kGroup; ++i) {
    const float size = log_scale(v[i], row);
    const uint32_t bits = bits_of(size) & 0x7FFFFFFFu;
    sizes[i] = size;
    largest = bits > largest ? bits : largest;
  }
  return largest <= bits_of(kNear0);
}

template <bool kUsesOut, bool kStoresX0>
DDPM_HD void learned_group(const LearnedBlock& b, const Row<float>& row) {
  alignas(64) float noise[kGroup];
  if (log_scales(b.v, row, noise)) {
    for (int i = 0; i < kGroup; ++i) noise[i] = exponential_near_0(noise[i]) * b.noise[i];
  } else {
    for (int i = 0; i < kGroup; ++i) noise[i] = exponential(noise[i]) * b.noise[i];
  }
#pragma GCC ivdep
  for (int i = 0; i < kGroup; ++i) {
    const float x = b.x[i], out = b.out[i];
    const float x0 = clip(predict_x0(x, out, row), row.clip);
    if constexpr (kStoresX0) b.pred_x0[i] = x0;
    b.next[i] = add_noise(step_mean<kUsesOut>(x, x0, out, row), noise[i], row);
  }
}

// The last elements, less than a group. Here and below the row is passed by value, so that no store
// can alias it.
template <bool kUsesOut, bool kStoresX0>
void learned_remainder(LearnedBlock b, int64_t count, Row<float> row) {
  alignas(64) float x[kGroup]{}, out[kGroup]{}, v[kGroup]{}, noise[kGroup]{}, x0[kGroup];
  const uint64_t bytes = static_cast<uint64_t>(count) * sizeof(float);
  __builtin_memcpy(x, b.x, bytes);
  __builtin_memcpy(out, b.out, bytes);
  __builtin_memcpy(v, b.v, bytes);
  __builtin_memcpy(noise, b.noise, bytes);
  learned_group<kUsesOut, kStoresX0>({x, out, v, noise, x, x0}, row);
  __builtin_memcpy(b.next, x, bytes);
  if constexpr (kStoresX0) __builtin_memcpy(b.pred_x0, x0, bytes);
}

// The output and the variance are dense.
template <bool kUsesOut, bool kStoresX0>
void learned_dense(LearnedBlock b, int64_t count, Row<float> row) {
  const int64_t whole = count - count % kGroup;
  for (int64_t i = 0; i < whole; i += kGroup) learned_group<kUsesOut, kStoresX0>(b.at(i), row);
  if (whole < count) learned_remainder<kUsesOut, kStoresX0>(b.at(whole), count - whole, row);
}

#if defined(DDPM_PERMUTES)
static_assert(kGroup == kTriples);

// The output and the variance are the two channel halves of one tensor with six channels, and the
// part begins with a whole pixel.
template <bool kUsesOut, bool kStoresX0>
void split_learned_variance(LearnedBlock b, int64_t count, Row<float> row) {
  alignas(64) float out[kGroup], v[kGroup];
  const int64_t whole = count - count % kGroup;
  for (int64_t i = 0; i < whole; i += kGroup) {
    split_learned_variance(b.out + 2 * i, out, v);
    learned_group<kUsesOut, kStoresX0>(b.with(i, out, v), row);
  }
  if (whole == count) return;
  const float* from = b.out + 2 * whole;
  for (int64_t i = 0; i < count - whole; ++i) {
    out[i] = from[i + i / 3 * 3];
    v[i] = from[i + i / 3 * 3 + 3];
  }
  learned_remainder<kUsesOut, kStoresX0>(b.with(whole, out, v), count - whole, row);
}

inline bool has_learned_variance(const View& out, const View& v) {
  return out.dtype == DType::f32 && v.dtype == DType::f32 && is_pixels(out) && is_pixels(v) &&
         out.sizes[1] == 3 && out.strides[0] == 6 && v.sizes[1] == 3 && v.strides[0] == 6 &&
         static_cast<const float*>(v.data) == static_cast<const float*>(out.data) + 3 &&
         v.sample_stride == out.sample_stride;
}
#endif

template <bool kUsesOut, bool kStoresX0>
void learned_part(const ReverseStepArgs& a, const Block& b, int64_t index, const Row<float>& row,
                  LearnedScratch& s) {
  LearnedBlock block;
  block.x = state_block(a, b, s.x);
  block.next = target_block(a.x, b.sample, b.first, s.x);
  block.noise = step_noise(a, b, index, s.normals, s.noise);
  block.pred_x0 = kStoresX0 ? target_block(a.pred_x0, b.sample, b.first, s.x0) : nullptr;
#if defined(DDPM_PERMUTES)
  if (has_learned_variance(a.out, a.log_variance)) {
    block.out = sample_pointer<const float>(a.out, b.sample) + 2 * b.first;
    split_learned_variance<kUsesOut, kStoresX0>(block, b.count, row);
  } else
#endif
  {
    block.out = read_block(a.out, b.sample, b.first, b.count, s.out);
    block.v = read_block(a.log_variance, b.sample, b.first, b.count, s.v);
    learned_dense<kUsesOut, kStoresX0>(block, b.count, row);
  }
  if (kStoresX0) write_block(a.pred_x0, b.sample, b.first, b.count, block.pred_x0);
  write_state(a, b, row, block.next, s.spare);
}

inline void learned_step(const ReverseStepArgs& a, const Block& block, int64_t index) {
  LearnedScratch scratch;
  Row<float> row = load_row(static_cast<const float*>(a.rows), index);
  if (!(a.flags & kClip)) row.clip = __builtin_inff();
  const bool stores_x0 = a.pred_x0.data != nullptr;
  const auto part = a.flags & kRawOut
                        ? (stores_x0 ? learned_part<true, true> : learned_part<true, false>)
                        : (stores_x0 ? learned_part<false, true> : learned_part<false, false>);
  for (int64_t done = 0; done < block.count; done += kLearnedPart) {
    const int64_t left = block.count - done;
    part(a, {block.sample, block.first + done, left < kLearnedPart ? left : kLearnedPart}, index,
         row, scratch);
  }
}

inline bool is_learned_step(const ReverseStepArgs& a) {
  const bool noisy = a.noise.data || a.rng.state;
  return noisy && (a.flags & kMultistepTerms) == kLearned;
}
