// A reverse step with multistep terms: guidance, a learned variance, thresholds, past values and a
// second state.
//
// A sample is processed in parts, small enough that all blocks of a part stay in the L1 cache, with
// one loop per sum: y' first, stored aside until y is no longer needed, then x' together with h0.
//
// Included once per instruction set, inside namespace ddpm::DDPM_ISA (see kernels.inl).

// Elements of a part: a multiple of those that make_normals generates together.
constexpr int64_t kPart = 512;
constexpr int kMostTerms = 5 + kDeepest;  // x, x0, out, y, the past values and the noise
static_assert(kBlock % kPart == 0 && kPart % (4 * kLanes) == 0);

// A sum of coefficients times blocks, evaluated in order.
template <int kCount, class R>
struct Sum {
  R coefficients[kCount];
  const R* blocks[kCount];

  DDPM_HD R at(int64_t i) const {
    R value = coefficients[0] * blocks[0][i];
#pragma GCC unroll 8
    for (int k = 1; k < kCount; ++k) value = fma(coefficients[k], blocks[k][i], value);
    return value;
  }
};

template <class R>
class Terms {
 public:
  void add(R coefficient, const R* block) {
    coefficients_[count_] = coefficient;
    blocks_[count_++] = block;
  }

  // Calls f with the Sum of these terms, of which there are kLeast to kMost.
  template <int kLeast, int kMost, class F>
  DDPM_HD void visit(F f) const {
    if constexpr (kLeast < kMost) {
      if (count_ > kLeast) return visit<kLeast + 1, kMost>(f);
    }
    Sum<kLeast, R> sum;
    for (int k = 0; k < kLeast; ++k) {
      sum.coefficients[k] = coefficients_[k];
      sum.blocks[k] = blocks_[k];
    }
    f(sum);
  }

 private:
  R coefficients_[kMostTerms];
  const R* blocks_[kMostTerms];
  int count_ = 0;
};

// The result may alias one of the blocks: an element is read before it is written.
template <class Sum, class R>
void write_sum(const Sum& sum, int64_t count, R* to) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) to[i] = sum.at(i);
}

template <class Sum, class Other, class R>
void write_sums(const Sum& sum, const Other& other, int64_t count, R* to, R* to_other) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const R value = sum.at(i), other_value = other.at(i);
    to[i] = value;
    to_other[i] = other_value;
  }
}

// Buffers for tensors that cannot be accessed in place, and for intermediate results.
template <class R>
struct StepScratch {
  alignas(64) R x[kPart], out[kPart], noise[kPart], x0[kPart];
  alignas(64) R second[kPart], past[kDeepest][kPart], spare[kPart];
  alignas(64) float normals[kPart];
};

template <class R>
class StepPart {
 public:
  StepPart(const ReverseStepArgs& a, StepScratch<R>& scratch) : a_(a), s_(scratch) {
    for (int64_t i = 0; i < a.depth; ++i) {
      slots_[i] = a.history;
      const int64_t bytes = a.history.dtype == DType::f64   ? 8
                            : a.history.dtype == DType::f32 ? 4
                                                            : 2;
      slots_[i].data = static_cast<char*>(a.history.data) + i * a.slot_stride * bytes;
    }
  }

  void run(const Block& b, int64_t index) {
    const Row<R> row = load_row(static_cast<const R*>(a_.rows), index);
    const R* x = state_block(a_, b, s_.x);
    R* new_x = target_block(a_.x, b.sample, b.first, s_.x);
    const R* out = output(b, row);
    const R* noise = scaled_noise(b, row, index);
    R* x0 = a_.pred_x0.data ? target_block(a_.pred_x0, b.sample, b.first, s_.x0) : s_.x0;
    predict(b, row, x, out, x0);
    if (a_.pred_x0.data) write_block(a_.pred_x0, b.sample, b.first, b.count, x0);

    Terms<R> next, second;
    next.add(row.Xx, x);
    next.add(row.Xx0, x0);
    second.add(row.Yx, x);
    second.add(row.Yx0, x0);
    if (has(kRawOut)) next.add(row.Xo, out);
    R* y = nullptr;
    if (has(kSecond)) {
      y = updated_block(a_.second, b, s_.second);
      next.add(row.Xy, y);
      second.add(row.Yy, y);
    }
    for (int k = 1; k <= kDeepest; ++k) {
      if (!reads_past(a_.flags, k)) continue;
      const R* past = read_block(slot(row, k), b.sample, b.first, b.count, s_.past[k - 1]);
      next.add(row.history_coef(k), past);
      second.add(row.history_coef_second(k), past);
    }
    if (noise) next.add(row.S, noise);

    if (y) {
      second.template visit<3, 3 + kDeepest>(
          [&](const auto& sum) { write_sum(sum, b.count, s_.spare); });
    }
    if (has(kPush) && row.push != R(0)) {
      push(b, row, next, x, out, x0, new_x);
    } else {
      next.template visit<2, kMostTerms>([&](const auto& sum) { write_sum(sum, b.count, new_x); });
    }
    if (y) {
      for (int64_t i = 0; i < b.count; ++i) y[i] = s_.spare[i];
      write_block(a_.second, b.sample, b.first, b.count, y);
    }
    write_state(a_, b, row, new_x, s_.spare);
  }

 private:
  bool has(int64_t flag) const { return (a_.flags & flag) != 0; }

  const View& slot(const Row<R>& row, int k) const {
    return slots_[past_slot(row, k, static_cast<int>(a_.depth))];
  }

  const R* output(const Block& b, const Row<R>& row) {
    const R* out = read_block(a_.out, b.sample, b.first, b.count, s_.out);
    if (!has(kGuide)) return out;
    const R* out2 = read_block(a_.out2, b.sample, b.first, b.count, s_.spare);
#pragma GCC ivdep
    for (int64_t i = 0; i < b.count; ++i) s_.out[i] = guided(out[i], out2[i], row);
    return s_.out;
  }

  // Null if the step has no noise.
  const R* scaled_noise(const Block& b, const Row<R>& row, int64_t index) {
    const R* noise = step_noise(a_, b, index, s_.normals, s_.noise);
    if (!noise || !has(kLearned)) return noise;
    const R* v = read_block(a_.log_variance, b.sample, b.first, b.count, s_.spare);
    if (scales_are_near_1(v, b.count, row)) {
#pragma GCC ivdep
      for (int64_t i = 0; i < b.count; ++i) {
        const float scale = exponential_near_0(static_cast<float>(log_scale(v[i], row)));
        s_.noise[i] = static_cast<R>(scale) * noise[i];
      }
      return s_.noise;
    }
#pragma GCC ivdep
    for (int64_t i = 0; i < b.count; ++i) s_.noise[i] = scale_noise(noise[i], v[i], row);
    return s_.noise;
  }

  // True in nearly every step of a chain. Then exponential_near_0 is enough, half of the
  // exponential.
  static bool scales_are_near_1(const R* v, int64_t count, const Row<R>& row) {
    if constexpr (sizeof(R) == 8) return false;
    uint32_t largest = 0;  // a NaN is larger than any number
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t size = bits_of(static_cast<float>(log_scale(v[i], row))) & 0x7FFFFFFFu;
      largest = size > largest ? size : largest;
    }
    return largest <= bits_of(kNear0);
  }

  void predict(const Block& b, const Row<R>& row, const R* x, const R* out, R* x0) const {
    if (has(kThreshold)) {
      const R bound = static_cast<const R*>(a_.threshold)[b.sample * a_.threshold_stride];
#pragma GCC ivdep
      for (int64_t i = 0; i < b.count; ++i) x0[i] = threshold(predict_x0(x[i], out[i], row), bound);
    } else if (has(kClip)) {
#pragma GCC ivdep
      for (int64_t i = 0; i < b.count; ++i) x0[i] = clip(predict_x0(x[i], out[i], row), row.clip);
    } else {
#pragma GCC ivdep
      for (int64_t i = 0; i < b.count; ++i) x0[i] = predict_x0(x[i], out[i], row);
    }
  }

  // Writes x' and h0 in one loop.
  void push(const Block& b, const Row<R>& row, const Terms<R>& next, const R* x, const R* out,
            const R* x0, R* new_x) {
    Terms<R> pushed;
    pushed.add(row.Hx, x);
    pushed.add(row.Hv, x0);
    if (has(kPushOut)) pushed.add(row.Ho, out);
    const View& view = slot(row, 0);
    R* to = target_block(view, b.sample, b.first, s_.past[0]);
    next.template visit<2, kMostTerms>([&](const auto& sum) {
      pushed.template visit<2, 3>(
          [&](const auto& other) { write_sums(sum, other, b.count, new_x, to); });
    });
    write_block(view, b.sample, b.first, b.count, to);
  }

  const ReverseStepArgs& a_;
  StepScratch<R>& s_;
  View slots_[kDeepest];
};
