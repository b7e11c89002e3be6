// The CPU kernels against the equations in double, and the instruction sets against each other: the
// same bytes for every set and every split of the work.
#include <cmath>
#include <sstream>

#include "check.h"
#include "core/normal.h"
#include "cpu/instruction_sets.h"
#include "nan_problem.h"
#include "run_cpu.h"

namespace ddpm::test {
namespace {

constexpr int kTrials = 400;

// A value of the equations, and the sum of the magnitudes of its terms.
struct Sum {
  double value = 0, magnitude = 0;

  void add(double coefficient, double term) {
    value += coefficient * term;
    magnitude += std::fabs(coefficient * term);
  }
  void add(double coefficient, const Sum& term) {
    value += coefficient * term.value;
    magnitude += std::fabs(coefficient) * term.magnitude;
  }
};

// Half an ulp of the dtype, and a few ulp of the arithmetic.
bool close(double got, const Sum& expected, DType dtype, bool wide) {
  double bound = expected.magnitude * (wide ? 0x1p-50 : 0x1p-21);
  if (dtype == DType::f16) bound += std::fabs(expected.value) * 0x1p-11 + 0x1p-25;
  if (dtype == DType::bf16) bound += std::fabs(expected.value) * 0x1p-8;
  if (dtype == DType::f32) bound += std::fabs(expected.value) * 0x1p-24 + 0x1p-149;
  return std::fabs(got - expected.value) <= bound;
}

int64_t clamped(int64_t t, int64_t rows) {
  return t < 0 ? 0 : t < rows ? t : rows - 1;
}

// Number of an element in channels-last order: every spatial dimension, then the channel.
int64_t number_of(const Sizes& index, const Sizes& sizes) {
  int64_t number = 0;
  for (size_t d = 2; d < index.size(); ++d) number = number * sizes[d] + index[d];
  return index.size() > 1 ? number * sizes[1] + index[1] : 0;
}

double generated_noise(const Common& p, const Sizes& index, int64_t stream) {
  const int64_t number = number_of(index, p.sizes);
  const Normal4 n = normal4(static_cast<uint32_t>(number / 4), static_cast<uint32_t>(stream),
                            static_cast<uint64_t>(p.rng_state[2] + index[0]),
                            static_cast<uint64_t>(p.rng_state[0]));
  return static_cast<double>(n.z[number % 4]);
}

void check_outcome(const QSampleProblem& p, const QSampleProblem& before, const char* kernels) {
  p.x_t.each([&](const Sizes& index) {
    const int64_t row = 2 * clamped(p.index_of(index[0]), p.rows);
    if (p.generated) {
      Sum noise;
      noise.add(1, generated_noise(p, index, p.rng_state[1]));
      CHECK(close(p.noise.get(index), noise, p.noise.dtype(), true), kernels, p.noise.get(index),
            noise.value);
    }
    Sum x_t;
    x_t.add(p.coefs[row], before.x0.get(index));
    x_t.add(p.coefs[row + 1], p.noise.get(index));
    CHECK(close(p.x_t.get(index), x_t, p.x_t.dtype(), p.wide), kernels, p.x_t.get(index), x_t.value,
          name_of(p.x_t.dtype()));
  });
}

void check_outcome(const QPosteriorProblem& p, const QPosteriorProblem& before,
                   const char* kernels) {
  p.mean.each([&](const Sizes& index) {
    const int64_t row = 4 * clamped(p.index_of(index[0]), p.rows);
    Sum mean;
    mean.add(p.coefs[row], before.x0.get(index));
    mean.add(p.coefs[row + 1], before.x_t.get(index));
    CHECK(close(p.mean.get(index), mean, p.mean.dtype(), p.wide), kernels, p.mean.get(index),
          mean.value);
  });
  for (int64_t n = 0; n < p.samples(); ++n) {
    const int64_t row = 4 * clamped(p.index_of(n), p.rows);
    CHECK(p.variance.get({n}) == p.coefs[row + 2], kernels, n);
    CHECK(p.log_variance.get({n}) == p.coefs[row + 3], kernels, n);
  }
}

// The sums of a step for one element, in the order of ddpm_fast/ops/row.py.
struct StepSums {
  Sum x0, next, second, pushed;

  StepSums(const ReverseStepProblem& p, const Sizes& index, int64_t row, double generated) {
    const auto of = [&](RowColumn name) { return p.column(row, name); };
    const auto has = [&](int64_t flag) { return (p.flags & flag) != 0; };
    const double x = p.state().get(index);
    Sum out;
    out.add(has(kGuide) ? of(kRow_G0) : 1.0, p.out.get(index));
    if (has(kGuide)) out.add(of(kRow_G1), p.out2.get(index));
    x0.add(of(kRow_P), x);
    x0.add(of(kRow_Q), out);
    if (has(kThreshold)) {
      const double bound = p.threshold[index[0] * p.threshold_stride];
      x0.value = std::fmin(std::fmax(x0.value, -bound), bound) / bound;
      x0.magnitude /= bound;
    } else if (has(kClip)) {
      x0.value = std::fmin(std::fmax(x0.value, -of(kRow_clip)), of(kRow_clip));
    }
    next.add(of(kRow_Xx), x);
    next.add(of(kRow_Xx0), x0);
    if (has(kRawOut)) next.add(of(kRow_Xo), out);
    second.add(of(kRow_Yx), x);
    second.add(of(kRow_Yx0), x0);
    if (has(kSecond)) {
      next.add(of(kRow_Xy), p.second.get(index));
      second.add(of(kRow_Yy), p.second.get(index));
    }
    for (int k = 1; k <= kDeepest; ++k) {
      if (!reads_past(p.flags, k)) continue;
      const double past = p.history.get(p.in_ring(index, row, k));
      next.add(of(static_cast<RowColumn>(kRow_Xh1 + k - 1)), past);
      second.add(of(static_cast<RowColumn>(kRow_Yh1 + k - 1)), past);
    }
    if (p.generated || p.noise.exists()) {
      Sum noise;
      noise.add(1, p.generated ? generated : p.noise.get(index));
      if (has(kLearned)) {
        const double v = p.log_variance.get(index), low = of(kRow_Lmin), high = of(kRow_Lmax);
        const double e = std::exp((low + v * (high - low)) / 2);
        noise.value *= e;
        noise.magnitude *= e * (1 + std::fabs(low) + std::fabs(v * (high - low)));
      }
      next.add(of(kRow_S), noise);
    }
    pushed.add(of(kRow_Hx), x);
    pushed.add(of(kRow_Hv), x0);
    if (has(kPushOut)) pushed.add(of(kRow_Ho), out);
  }
};

// Checks every slot of the history at one element.
void check_history(const ReverseStepProblem& p, const ReverseStepProblem& before, Sizes index,
                   int64_t row, const Sum& pushed, const char* kernels) {
  const bool pushes = p.flags & kPush && p.column(row, kRow_push) != 0;
  const Sizes target = p.in_ring(index, row, 0);
  for (int64_t slot = 0; slot < p.depth; ++slot, index[0] += p.samples()) {
    const double got = p.history.get(index);
    if (pushes && index == target) {
      CHECK(close(got, pushed, p.history.dtype(), p.wide), kernels, got, pushed.value);
    } else {
      CHECK(got == before.history.get(index), kernels, slot);
    }
  }
}

void check_outcome(const ReverseStepProblem& p, const ReverseStepProblem& before,
                   const char* kernels) {
  const auto check = [&](const TestTensor& tensor, const Sizes& index, const Sum& expected) {
    if (!tensor.exists()) return;
    CHECK(close(tensor.get(index), expected, tensor.dtype(), p.wide), kernels, p.flags,
          tensor.get(index), expected.value, name_of(tensor.dtype()));
  };
  CHECK(p.source.same_memory(before.source), kernels);
  p.x.each([&](const Sizes& index) {
    const int64_t row = p.index_of(index[0]);
    if (row < 0 || row >= p.rows) {
      for (const auto& [ran_tensor, before_tensor] :
           {std::pair{&p.x, &before.x}, {&p.pred_x0, &before.pred_x0}}) {
        if (!ran_tensor->exists()) continue;
        const double got = ran_tensor->get(index);
        CHECK(p.source.exists() ? std::isnan(got) : got == before_tensor->get(index), kernels, row);
      }
      if (p.second.exists()) CHECK(p.second.get(index) == before.second.get(index), kernels, row);
      for (Sizes at = index; p.depth > 0 && at[0] < p.depth * p.samples(); at[0] += p.samples()) {
        CHECK(p.history.get(at) == before.history.get(at), kernels, row);
      }
      return;
    }
    const double generated = p.generated ? generated_noise(p, index, p.rng_state[1] + row) : 0.0;
    const StepSums sums(before, index, row, generated);
    check(p.x, index, sums.next);
    check(p.pred_x0, index, sums.x0);
    Sum input;
    input.add(p.flags & kScaleIn ? p.column(row, kRow_Cin) : 1.0, sums.next);
    check(p.model_input, index, input);
    check(p.second, index, sums.second);
    if (p.depth > 0) check_history(p, before, index, row, sums.pushed, kernels);
  });
}

void check_outcome(const PhiloxNormalProblem& p, const PhiloxNormalProblem&, const char* kernels) {
  p.out.each([&](const Sizes& index) {
    Sum noise;
    noise.add(1, generated_noise(p, index, p.rng_state[1]));
    CHECK(close(p.out.get(index), noise, p.out.dtype(), true), kernels, p.out.get(index),
          noise.value);
  });
}

// Checks that nothing between the elements was written.
template <class Problem>
void check_gaps(const Problem& ran, const Problem& before, const char* kernels) {
  const auto ran_outputs = ran.outputs(), before_outputs = before.outputs();
  for (size_t i = 0; i < ran_outputs.size(); ++i) {
    if (!ran_outputs[i]->exists()) continue;
    TestTensor expected(*before_outputs[i]);
    expected.each([&](const Sizes& index) { expected.set(index, ran_outputs[i]->get(index)); });
    CHECK(expected.same_memory(*ran_outputs[i]), kernels, before.shape, i);
  }
}

std::vector<std::string> names() {
  std::istringstream list(runnable_instruction_sets());
  std::vector<std::string> result;
  for (std::string name; list >> name;) result.push_back(name);
  return result;
}

template <class Problem>
void against_the_equations() {
  Random random(11);
  for (int trial = 0; trial < kTrials; ++trial) {
    Choices choices;
    choices.wide = random.coin();
    choices.generated = random.coin();
    const Problem before(choices, random);
    CHECK(select_cpu_kernels("baseline"));
    const Problem baseline(before);
    run_cpu(baseline);
    check_outcome(baseline, before, "baseline");
    check_gaps(baseline, before, "baseline");
    for (const std::string& name : names()) {
      CHECK(select_cpu_kernels(name.c_str()), name);
      const Problem other(before);
      run_cpu(other, 1 + random.below(4));
      CHECK(same_outputs(baseline, other), name, before.shape, trial);
    }
  }
  select_cpu_kernels("auto");
}

// The normals of a sample are the same in any batch, for any first Philox block.
void normals_do_not_depend_on_the_batch() {
  static const std::vector<Shape> batch = {{{6, 3, 19, 37}, "batch"}};
  static const std::vector<Shape> alone = {{{1, 3, 19, 37}, "alone"}};
  Random random(12);
  Choices choices;
  choices.from = &batch;
  PhiloxNormalProblem many(choices, random);
  many.out = TestTensor(DType::f32, many.sizes, Layout::contiguous, random);
  choices.from = &alone;
  PhiloxNormalProblem one(choices, random);
  one.out = TestTensor(DType::f32, one.sizes, Layout::channels_last, random);
  for (const std::string& name : names()) {
    CHECK(select_cpu_kernels(name.c_str()), name);
    std::copy(many.rng_state, many.rng_state + 3, one.rng_state);
    one.rng_state[2] += 4;
    run_cpu(many, 5);
    run_cpu(one);
    one.out.each([&](Sizes index) {
      const double value = one.out.get(index);
      index[0] = 4;
      CHECK(many.out.get(index) == value, name, value);
    });
  }
  select_cpu_kernels("auto");
}

void nan_passes_the_clip() {
  for (const std::string& name : names()) {
    CHECK(select_cpu_kernels(name.c_str()), name);
    for (bool wide : {false, true}) {
      for (bool multistep : {false, true}) {
        Random random(13);
        const NanProblem problem(NanProblem::choices(wide), multistep, random);
        run_cpu(problem);
        problem.check_outcome(name.c_str());
      }
    }
  }
  select_cpu_kernels("auto");
}

// No content of a row makes a kernel write outside the history.
void any_slot_is_one_of_the_ring() {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  Row<double> row{};
  for (int depth = 1; depth <= kDeepest; ++depth) {
    for (int k = 0; k <= depth; ++k) {
      for (double slot : {nan, -1e300, -1.0, 0.0, 1.0, 2.0, 3.0, 1e300}) {
        row.slot = slot;
        const int got = past_slot(row, k, depth);
        CHECK(got >= 0 && got < depth, slot, k, depth, got);
      }
      for (int slot = 0; slot < depth; ++slot) {
        row.slot = slot;
        CHECK(past_slot(row, k, depth) == (slot + depth - k) % depth, slot, k, depth);
      }
    }
  }
}

void kernels_are_selected_by_name() {
  const std::vector<std::string> all = names();
  CHECK(!all.empty() && all.front() == "baseline");
  CHECK(!select_cpu_kernels("sse9"));
  CHECK(select_cpu_kernels("auto") && cpu_kernels().name == all.back(), cpu_kernels().name);
  for (const std::string& name : all) {
    CHECK(select_cpu_kernels(name.c_str()) && cpu_kernels().name == name, name);
  }
  CHECK(!select_cpu_kernels("sse9") && cpu_kernels().name == all.back());
  select_cpu_kernels("auto");
}

}  // namespace
}  // namespace ddpm::test

int main() {
  using namespace ddpm::test;
  return run(kernels_are_selected_by_name, against_the_equations<QSampleProblem>,
             against_the_equations<QPosteriorProblem>, against_the_equations<ReverseStepProblem>,
             against_the_equations<PhiloxNormalProblem>, normals_do_not_depend_on_the_batch,
             nan_passes_the_clip, any_slot_is_one_of_the_ring);
}
