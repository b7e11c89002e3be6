// Random problems for the diffusion kernels: tensors, tables and the kernel arguments for them.
//
// A problem can be copied and run several times; every copy has its own memory.
#pragma once

#include <limits>

#include "core/args.h"
#include "core/row.h"
#include "tensors.h"

namespace ddpm::test {

// A table of numbers in the dtype of the arithmetic.
class Table {
 public:
  Table() = default;
  Table(bool wide, std::vector<double> values) : wide_(wide), values_(std::move(values)) {
    narrow_.assign(values_.begin(), values_.end());
    if (!wide) values_.assign(narrow_.begin(), narrow_.end());
  }
  double operator[](int64_t i) const { return values_[static_cast<size_t>(i)]; }
  const void* data() const {
    return wide_ ? static_cast<const void*>(values_.data()) : narrow_.data();
  }

 private:
  bool wide_ = false;
  std::vector<double> values_;
  std::vector<float> narrow_;
};

inline Table random_table(bool wide, int64_t count, Random& random) {
  std::vector<double> values(static_cast<size_t>(count));
  for (double& value : values) value = random.symmetric(1.5);
  return Table(wide, values);
}

// Members of every problem.
struct Common {
  Sizes sizes;
  const char* shape = "";
  bool wide = false;       // float64 arithmetic
  bool generated = false;  // noise generated in the kernel
  WalkOrder order{};
  std::vector<int64_t> index;  // t or step, with a stride
  int64_t index_stride = 1;
  int64_t rows = 1;
  int64_t rng_state[3] = {};

  int64_t samples() const { return sizes[0]; }
  int64_t elements() const { return product(sizes, 1); }
  int64_t index_of(int64_t sample) const {
    return index[static_cast<size_t>(sample * index_stride)];
  }
  Rng rng() const { return {generated ? rng_state : nullptr}; }
};

struct Shape {
  Sizes sizes;
  const char* name;
};

inline const std::vector<Shape>& shapes() {
  static const std::vector<Shape> all = {
      {{5}, "one-element"},         {{2, 3, 2, 2}, "tiny"},        {{3, 1, 1, 1}, "ones"},
      {{2, 3, 7, 7}, "odd-hw"},     {{4, 5}, "vectors"},           {{2, 2, 3, 4, 5}, "video"},
      {{1, 2, 33, 31}, "odd"},      {{3, 4, 16, 16}, "one-block"}, {{2, 3, 16, 16}, "partial"},
      {{2, 1, 23, 44}, "ragged"},   {{2, 3, 32, 32}, "cifar"},     {{1, 5, 21, 52}, "long"},
      {{0, 3, 4, 4}, "no-samples"}, {{3, 0, 2}, "no-elements"},
  };
  return all;
}

struct Choices {
  const std::vector<Shape>* from = &shapes();
  bool wide = false;
  bool generated = false;
  // Channels-last tensors only; model outputs are often half of the channels of a larger one.
  bool channels_last_only = false;
};

inline DType random_dtype(const Choices& c, Random& random) {
  return static_cast<DType>(random.below(c.wide ? 4 : 3));
}

inline TestTensor random_input(const Common& p, const Choices& c, Random& random) {
  const Layout layout = c.channels_last_only ? Layout::channels_last : random_layout(random);
  TestTensor tensor(random_dtype(c, random), p.sizes, layout, random);
  tensor.fill(random, 2.0);
  return tensor;
}

inline TestTensor random_of_model(const Common& p, const Choices& c, Random& random) {
  if (!c.channels_last_only || random.coin()) return random_input(p, c, random);
  TestTensor tensor(random_dtype(c, random), p.sizes, Layout::channel_slice, random);
  tensor.fill(random, 2.0);
  return tensor;
}

inline TestTensor random_output(const Sizes& sizes, const Choices& c, DType dtype, Random& random) {
  Layout layout = random_layout(random);
  while (!writable(layout)) layout = random_layout(random);
  TestTensor tensor(dtype, sizes, c.channels_last_only ? Layout::channels_last : layout, random);
  tensor.fill(random, 2.0);
  return tensor;
}

inline Common random_common(const Choices& c, Random& random) {
  Common p;
  const Shape& shape =
      (*c.from)[static_cast<size_t>(random.below(static_cast<int64_t>(c.from->size())))];
  p.sizes = shape.sizes;
  p.shape = shape.name;
  p.wide = c.wide;
  p.generated = c.generated;
  p.rows = 1 + random.below(6);
  p.index_stride = random.below(3);
  p.index.resize(static_cast<size_t>(p.samples() * p.index_stride + 1));
  constexpr int64_t kFar[] = {-1, std::numeric_limits<int64_t>::min(),
                              std::numeric_limits<int64_t>::max(), 1000};
  for (int64_t& index : p.index) {
    index = random.below(5) ? random.below(p.rows) : kFar[random.below(4)];
  }
  p.rng_state[0] = static_cast<int64_t>(random.word());
  p.rng_state[1] = static_cast<int64_t>(random.word() >> 32);
  p.rng_state[2] = random.below(int64_t{1} << 40);
  return p;
}

inline void set_order(Common& p, const TestTensor& state) {
  const int ndim = state.ndim();
  p.order = p.generated ? channels_last_order(ndim)
                        : memory_order(ndim, state.sizes().data(), state.strides().data());
}

inline DType random_state(const Choices& c, Random& random) {
  return c.wide ? DType::f64 : static_cast<DType>(random.below(3));
}

struct QSampleProblem : Common {
  using Args = QSampleArgs;
  TestTensor x0, noise, x_t;
  Table coefs;

  QSampleProblem(const Choices& c, Random& random) : Common(random_common(c, random)) {
    x0 = random_input(*this, c, random);
    noise = generated ? random_output(sizes, c, random_dtype(c, random), random)
                      : random_input(*this, c, random);
    x_t = random_output(sizes, c, random_state(c, random), random);
    coefs = random_table(wide, 2 * rows, random);
    set_order(*this, x_t);
  }

  Args args() const {
    return {samples(),
            elements(),
            x0.view(order),
            noise.view(order),
            x_t.view(order),
            index.data(),
            index_stride,
            coefs.data(),
            rows,
            rng()};
  }
  std::vector<const TestTensor*> outputs() const { return {&noise, &x_t}; }
};

struct QPosteriorProblem : Common {
  using Args = QPosteriorArgs;
  TestTensor x0, x_t, mean, variance, log_variance;
  Table coefs;

  QPosteriorProblem(const Choices& c, Random& random) : Common(random_common(c, random)) {
    x0 = random_input(*this, c, random);
    x_t = random_input(*this, c, random);
    mean = random_output(sizes, c, random_state(c, random), random);
    const DType native = wide ? DType::f64 : DType::f32;
    variance = TestTensor(native, {samples()}, Layout::contiguous, random);
    log_variance = TestTensor(native, {samples()}, Layout::contiguous, random);
    coefs = random_table(wide, 4 * rows, random);
    set_order(*this, mean);
  }

  Args args() const {
    const WalkOrder none{};
    return {samples(),
            elements(),
            x0.view(order),
            x_t.view(order),
            mean.view(order),
            index.data(),
            index_stride,
            coefs.data(),
            rows,
            variance.view(none).data,
            log_variance.view(none).data};
  }
  std::vector<const TestTensor*> outputs() const { return {&mean, &variance, &log_variance}; }
};

// Random flags that are valid together. Plain flags alone are frequent unless `multistep` is set,
// and so is a learned variance as the only other flag, which has its own loop.
inline int64_t random_flags(bool multistep, Random& random) {
  if (!multistep && random.coin()) return random.below(8);
  if (random.below(3) == 0) return random.below(8) | kLearned;
  int64_t flags = random.below(kKnownFlags + 1);
  if (flags & kPast) flags |= kPush;
  if (!(flags & kPush)) flags &= ~kPushOut;
  return flags & kMultistepTerms ? flags : flags | kGuide;
}

struct ReverseStepProblem : Common {
  using Args = ReverseStepArgs;
  TestTensor x, source, out, noise, model_input, pred_x0, out2, log_variance, second;
  TestTensor history;  // [depth * samples, ...]
  Table table, threshold;
  int64_t flags = 0, depth = 0, threshold_stride = 1;

  ReverseStepProblem(const Choices& c, Random& random) : Common(random_common(c, random)) {
    flags = random_flags(c.channels_last_only, random);
    const bool in_place = generated || random.coin();
    if (!in_place) flags &= kFunctionalFlags;
    x = random_output(sizes, c, random_state(c, random), random);
    if (!in_place) source = random_input(*this, c, random);
    out = random_of_model(*this, c, random);
    if (!generated && random.coin()) noise = random_input(*this, c, random);
    if (in_place && random.coin()) {
      model_input = random_output(sizes, c, random_dtype(c, random), random);
    }
    if (random.coin()) pred_x0 = random_output(sizes, c, random_dtype(c, random), random);
    if (flags & kGuide) out2 = random_of_model(*this, c, random);
    if (flags & kLearned) log_variance = random_of_model(*this, c, random);
    if (flags & kSecond) second = random_output(sizes, c, random_dtype(c, random), random);
    if (flags & kRing) {
      const int64_t needed = history_depth(flags);
      depth = needed + random.below(kDeepest + 1 - needed);
      depth = depth > 0 ? depth : 1;
      Sizes ring = sizes;
      ring[0] *= depth;
      history = random_output(ring, c, random_dtype(c, random), random);
    }
    set_rows(random);
    set_order(*this, x);
  }

  void set_rows(Random& random) {
    std::vector<double> values(static_cast<size_t>(rows * kRowWidth));
    for (double& value : values) value = random.symmetric(1.5);
    for (int64_t row = 0; row < rows; ++row) {
      double* row_values = &values[static_cast<size_t>(row * kRowWidth)];
      row_values[kRow_clip] =
          random.below(4) ? 0.2 + random.symmetric(0.1) : std::numeric_limits<double>::infinity();
      row_values[kRow_P] = random.below(5) ? row_values[kRow_P] : 0.0;
      row_values[kRow_ratio] =
          row_values[kRow_P] != 0 ? row_values[kRow_Q] / row_values[kRow_P] : 0.0;
      row_values[kRow_push] = static_cast<double>(random.below(2));
      row_values[kRow_slot] = static_cast<double>(depth > 0 ? random.below(depth) : 0);
    }
    table = Table(wide, values);
    threshold_stride = random.below(3);
    std::vector<double> bounds(static_cast<size_t>(samples() * threshold_stride + 1));
    for (double& bound : bounds) bound = 0.6 + random.symmetric(0.4);
    threshold = Table(wide, bounds);
  }

  Args args() const {
    return {samples(),
            elements(),
            x.view(order),
            out.view(order),
            noise.view(order),
            model_input.view(order),
            pred_x0.view(order),
            table.data(),
            rows,
            index.data(),
            index_stride,
            flags,
            rng(),
            out2.view(order),
            log_variance.view(order),
            second.view(order),
            history.view(order),
            depth > 0 ? samples() * history.strides()[0] : 0,
            depth,
            flags & kThreshold ? threshold.data() : nullptr,
            threshold_stride,
            source.view(order)};
  }
  std::vector<const TestTensor*> outputs() const {
    return {&x, &model_input, &pred_x0, &second, &history};
  }
  const TestTensor& state() const { return source.exists() ? source : x; }
  double column(int64_t row, RowColumn name) const { return table[row * kRowWidth + name]; }
  // Index of h_k in the history; for k = 0 of the pushed value.
  Sizes in_ring(Sizes index, int64_t row, int64_t k) const {
    const int64_t slot = static_cast<int64_t>(column(row, kRow_slot));
    index[0] += (slot + depth - k) % depth * samples();
    return index;
  }
};

struct PhiloxNormalProblem : Common {
  using Args = PhiloxNormalArgs;
  TestTensor out;

  PhiloxNormalProblem(const Choices& c, Random& random) : Common(random_common(c, random)) {
    generated = true;
    out = random_output(sizes, c, random_dtype(c, random), random);
    set_order(*this, out);
  }

  Args args() const { return {samples(), elements(), out.view(order), rng()}; }
  std::vector<const TestTensor*> outputs() const { return {&out}; }
};

template <class Problem>
bool same_outputs(const Problem& a, const Problem& b) {
  const auto a_outputs = a.outputs(), b_outputs = b.outputs();
  for (size_t i = 0; i < a_outputs.size(); ++i) {
    if (!a_outputs[i]->same_memory(*b_outputs[i])) return false;
  }
  return true;
}

}  // namespace ddpm::test
