// group_norm_ against float64: the CPU kernels of every instruction set, and the phases of the CUDA
// kernels, run on the host for every block of a launch.
#include <algorithm>
#include <set>
#include <string>

#include "cpu/instruction_sets.h"
#include "cpu/kernels.h"
#include "group_norm_problem.h"
#include "host_exec.h"
#include "sparse.h"

namespace ddpm::test {
namespace {

constexpr DType kDTypes[] = {DType::f16, DType::bf16, DType::f32, DType::f64};
constexpr Layout kLayouts[] = {Layout::channels_last, Layout::contiguous, Layout::permuted,
                               Layout::sliced,        Layout::padded,     Layout::unaligned};

std::vector<std::string> kernel_names() {
  std::vector<std::string> names;
  std::string all = runnable_instruction_sets();
  for (size_t from = 0; from < all.size();) {
    const size_t to = std::min(all.find(' ', from), all.size());
    names.push_back(all.substr(from, to - from));
    from = to + 1;
  }
  return names;
}

void run_on_cpu(const GroupNormArgs& a, int64_t calls) {
  const NormSlabs slabs(a);
  std::vector<char> memory(static_cast<size_t>(slabs.workspace_bytes(a)) + 64);
  void* workspace = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64);
  const int64_t work = a.samples * slabs.per_sample;
  for (int64_t i = calls; i-- > 0;) {
    cpu_kernels().group_norm(a, work * i / calls, work * (i + 1) / calls, workspace);
  }
}

void cpu_kernels_are_right() {
  Random random(3);
  for (int trial = 0; trial < 150; ++trial) {
    NormChoices choices = random_choices(random);
    choices.dtype = kDTypes[trial % 4];
    choices.layout = kLayouts[random.below(6)];
    const NormProblem problem(choices, random);
    const NormReference reference(problem);
    for (const std::string& name : kernel_names()) {
      CHECK(select_cpu_kernels(name.c_str()), name);
      const NormProblem whole(problem), parts(problem);
      run_on_cpu(whole.args(), 1);
      run_on_cpu(parts.args(), 3);
      reference.check(whole, name.c_str());
      CHECK(whole.out.same_memory(parts.out), name);
    }
  }
  select_cpu_kernels("auto");
}

// Properties of the plans in all trials, to check that none is missing.
struct Seen {
  std::set<uint32_t> held, units, clusters;
  int strided = 0, shuffled = 0, by_rows = 0, sums = 0;

  void add(const GroupNormArgs& a, const NormPlan& plan) {
    strided += !plan.vectorized;
    if (!plan.vectorized) return;
    clusters.insert(plan.cluster());
    units.insert(plan.unit);
    held.insert(plan.held);
    shuffled += plan.shuffled;
    by_rows += !plan.shuffled;
    sums += keeps_sum(a);
  }
  void check_all() const {
    CHECK(held == std::set<uint32_t>({1, 2, 4, 8}), held.size());
    CHECK(units == std::set<uint32_t>({1, 2, 4, 8}), units.size());
    CHECK(clusters == std::set<uint32_t>({1, 2, 4, 8}), clusters.size());
    CHECK(strided > 20 && shuffled > 20 && by_rows > 20 && sums > 20, strided, shuffled, by_rows,
          sums);
  }
};

void check_plan(const NormProblem& problem, const NormReference& reference, const NormPlan& plan) {
  const NormProblem forwards(problem), backwards(problem);
  CHECK(run_plan(forwards.args(), plan) == 0);
  CHECK(run_plan(backwards.args(), plan, true) == 0);
  const std::string what = text("slab", plan.slab, "rows", plan.rows, "held", plan.held, "cluster",
                                plan.cluster(), "stream", plan.stream);
  reference.check(forwards, what.c_str());
  CHECK(forwards.out.same_memory(backwards.out), what);
  CHECK(forwards.total.same_memory(backwards.total), what);
}

// Plans chosen for GPUs with one multiprocessor, as many as an H100 and very many, and plans with
// every valid slab and cluster size.
void cuda_kernels_are_right() {
  Random random(4);
  Seen seen;
  for (int trial = 0; trial < 240; ++trial) {
    NormChoices choices = random_choices(random);
    choices.dtype = trial % 2 == 0 ? DType::f16 : DType::f32;
    if (trial % 5 == 0) choices.layout = kLayouts[random.below(6)];
    const NormProblem problem(choices, random);
    const NormReference reference(problem);
    const GroupNormArgs a = problem.args();
    const NormDevice devices[] = {{1, 3}, {132, 3}, {108, 0}, {100000, 3}};
    NormPlan plan = choose_group_norm(a, devices[random.below(4)]);
    seen.add(a, plan);
    check_plan(problem, reference, plan);
    if (!plan.vectorized) continue;
    const int64_t values = 16 / element_bytes(a.dtype);
    const int64_t smallest = a.group_size() / greatest_divisor(a.group_size(), values) * values;
    const int64_t times = 1 + random.below(a.channels() / smallest);
    if (a.channels() / smallest % times != 0) continue;
    if (!plan_slab(a, times * smallest, static_cast<uint32_t>(random.below(4)), &plan)) continue;
    seen.add(a, plan);
    check_plan(problem, reference, plan);
  }
  seen.check_all();
}

// A slab that does not fit in registers, with the total aliasing the residual: each pass reads it
// again.
void streams_are_right() {
  Random random(5);
  for (DType dtype : {DType::f16, DType::f32}) {
    NormChoices choices;
    choices.dtype = dtype;
    choices.samples = 1;
    choices.first = 16;
    choices.groups = 1;
    choices.height = 64;
    choices.width = 100;
    choices.vector = choices.residual = choices.total = choices.over_residual = true;
    const NormProblem problem(choices, random);
    const NormReference reference(problem);
    for (uint32_t bits : {0u, 1u}) {
      NormPlan plan{};
      CHECK(plan_slab(problem.args(), 16, bits, &plan));
      CHECK(plan.stream);
      check_plan(problem, reference, plan);
    }
  }
}

bool same_plan(const NormPlan& plan, uint32_t slab, uint32_t cluster, bool stream) {
  return plan.vectorized && plan.slab == slab && plan.cluster() == cluster && plan.stream == stream;
}

// Plans for an H100: everything in registers from 4x4 to 256x256, also with a sum.
void plans_of_an_h100() {
  GroupNormArgs a{};
  alignas(16) static char memory[16];
  const auto plan = [&](int64_t samples, int64_t channels, int64_t size, bool sum = false) {
    a.samples = samples;
    a.height = a.width = size;
    a.first = channels;
    a.groups = 32;
    a.dtype = DType::f16;
    a.x = a.out = {memory, channels * size * size, 1, channels * size, channels};
    a.residual = a.total = sum ? a.x : Map{};
    return choose_group_norm(a, {132, 3});
  };
  CHECK(same_plan(plan(512, 128, 32), 32, 1, false));
  CHECK(same_plan(plan(512, 128, 32, true), 32, 1, false));
  CHECK(same_plan(plan(512, 256, 16), 32, 1, false));
  CHECK(same_plan(plan(512, 256, 4), 32, 1, false));
  CHECK(same_plan(plan(1, 256, 4), 8, 1, false));
  CHECK(same_plan(plan(1, 128, 32), 8, 2, false));
  CHECK(same_plan(plan(1, 128, 256), 8, 8, false));
  CHECK(same_plan(plan(8, 128, 256), 8, 8, false));
  CHECK(same_plan(plan(1, 128, 128, true), 8, 8, false));
  CHECK(plan(1, 128, 256, true).stream);
  a.x.row += 8;  // a cropped map
  CHECK(!choose_group_norm(a, {132, 3}).vectorized);
}

// Samples, pixels and channels with a distance of more than 2^31 elements.
void offsets_beyond_2_31() {
  constexpr int64_t kFar = (int64_t{1} << 31) + 64;  // elements
  const Sparse from(4 * 5 * kFar), to(4 * 5 * kFar);
  if (!from.exists() || !to.exists()) {
    std::printf("not run: offsets_beyond_2_31 needs 86 GB of address space\n");
    return;
  }
  Random random(6);
  NormChoices choices;
  choices.first = 8;
  choices.groups = 2;
  choices.height = 1;
  choices.width = 2;
  const NormProblem near(choices, random);
  const NormReference reference(near);
  const auto compare = [&](int64_t sample, int64_t channel, int64_t column, bool vectorized) {
    GroupNormArgs a = near.args();
    const auto offset = [&](const Sizes& at) {
      return at[0] * sample + at[1] * channel + at[3] * column;
    };
    a.x = {from.floats(), sample, channel, 2 * column, column};
    a.out = {to.floats(), sample, channel, 2 * column, column};
    near.x.each(
        [&](const Sizes& at) { from.floats()[offset(at)] = static_cast<float>(near.x.get(at)); });
    const NormPlan plan = choose_group_norm(a, {132, 3});
    CHECK(plan.vectorized == vectorized);
    for (bool on_cpu : {false, true}) {
      if (on_cpu) {
        run_on_cpu(a, 1);
      } else {
        CHECK(run_plan(a, plan) == 0);
      }
      NormProblem ran(near);
      ran.out.each([&](const Sizes& at) {
        float& value = to.floats()[offset(at)];
        ran.out.set(at, static_cast<double>(value));
        value = 0.0f;
      });
      reference.check(ran, on_cpu ? "cpu" : "kernels");
    }
  };
  compare(kFar, 1, 8, true);
  compare(16, 1, kFar, true);
  compare(2 * kFar, 1, kFar, true);
  compare(2, 4, 1, false);
  compare(1, kFar / 4, 2, false);
}

void samples_do_not_depend_on_the_batch() {
  Random random(7);
  NormChoices choices;
  choices.samples = 5;
  choices.first = 64;
  choices.groups = 32;
  choices.height = choices.width = 9;
  choices.dtype = DType::f16;
  const NormProblem problem(choices, random);
  const NormProblem together(problem), alone(problem);
  run_on_cpu(together.args(), 2);
  GroupNormArgs one = alone.args();
  one.samples = 1;
  for (int64_t n = 0; n < choices.samples; ++n) {
    run_on_cpu(one, 1);
    one.x.data = static_cast<half_t*>(one.x.data) + one.x.sample;
    one.out.data = static_cast<half_t*>(one.out.data) + one.out.sample;
  }
  CHECK(together.out.same_memory(alone.out));
}

}  // namespace
}  // namespace ddpm::test

int main() {
  using namespace ddpm::test;
  return run(cpu_kernels_are_right, cuda_kernels_are_right, streams_are_right, plans_of_an_h100,
             offsets_beyond_2_31, samples_do_not_depend_on_the_batch);
}
