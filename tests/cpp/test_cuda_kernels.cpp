// The threads of the CUDA kernels, run on the host one after another, against the CPU kernels: the
// same bytes in every tensor, including the gaps between elements.
#include <algorithm>

#include "check.h"
#include "cuda/diffusion/dispatch.cuh"
#include "nan_problem.h"
#include "run_cpu.h"
#include "sparse.h"

namespace ddpm::test {
namespace {

// Runs every thread of a launch.
template <class Args>
int run_kernels(const Args& args) {
  return dispatch(args, [](auto variant, const auto& params) {
    using Variant = decltype(variant);
    const Blocks blocks = Variant::Blocks::blocks(params.grid);
    const uint32_t blocks_y = static_cast<uint32_t>(blocks.y);
    for (uint32_t z = 0; z < blocks.z; ++z) {
      for (uint32_t y = 0; y < blocks.y; ++y) {
        for (uint32_t x = 0; x < blocks.x; ++x) {
          for (uint32_t thread = 0; thread < kThreads; ++thread) {
            run_thread<Variant>(params, {x, y, z, blocks_y}, thread);
          }
        }
      }
    }
    return 0;
  });
}

template <class Args>
bool runs_vectorized(const Args& args) {
  constexpr int kYes = 2, kNo = 3;
  return dispatch(args, [](auto variant, const auto&) {
           return std::is_same_v<typename decltype(variant)::Blocks, Flat> ? kNo : kYes;
         }) == kYes;
}

// Runs `wanted` problems that are vectorized, or that are not.
template <class Problem>
void same_as_cpu(const std::vector<Shape>& from, bool generated, bool vectors, int wanted,
                 bool channels_last_only = false) {
  Random random(5 + generated);
  Choices choices;
  choices.generated = generated;
  choices.channels_last_only = channels_last_only;
  choices.from = &from;
  int run = 0;
  for (int trial = 0; run < wanted && trial < 100 * wanted; ++trial) {
    const Problem on_cpu(choices, random);
    if (runs_vectorized(on_cpu.args()) != vectors) continue;
    const Problem on_threads(on_cpu);
    run_cpu(on_cpu);
    CHECK(run_kernels(on_threads.args()) == 0);
    CHECK(same_outputs(on_cpu, on_threads), on_cpu.shape, vectors, generated);
    ++run;
  }
  CHECK(run == wanted, run, vectors, generated);
}

const std::vector<Shape> large = {{{3, 4, 16, 16}, "one-block"},
                                  {{2, 1, 23, 44}, "ragged"},
                                  {{5, 8, 12, 12}, "partial"},
                                  {{1, 5, 21, 52}, "long"},
                                  {{1, 2, 33, 31}, "odd"}};

template <class Problem>
void same_as_cpu(bool generated) {
  same_as_cpu<Problem>(shapes(), generated, false, 400);
  same_as_cpu<Problem>(large, generated, true, 60);
}

void q_sample_same_as_cpu() {
  same_as_cpu<QSampleProblem>(false);
  same_as_cpu<QSampleProblem>(true);
}
void q_posterior_same_as_cpu() {
  same_as_cpu<QPosteriorProblem>(false);
}
void reverse_step_same_as_cpu() {
  same_as_cpu<ReverseStepProblem>(false);
  same_as_cpu<ReverseStepProblem>(true);
}
// With multistep terms, and model outputs that are half of a tensor's channels.
void vectorized_step_terms_same_as_cpu() {
  static const std::vector<Shape> images = {{{2, 3, 32, 32}, "cifar"},
                                            {{3, 4, 16, 16}, "one-block"},
                                            {{2, 1, 23, 44}, "ragged"},
                                            {{1, 7, 24, 13}, "seven"}};
  for (bool generated : {false, true})
    same_as_cpu<ReverseStepProblem>(images, generated, true, 200, true);
}
void philox_normal_same_as_cpu() {
  same_as_cpu<PhiloxNormalProblem>(true);
}

// Samples without elements still have a variance each.
void empty_samples_have_a_variance() {
  static const std::vector<Shape> empty = {{{3, 0, 2}, "empty"}};
  Random random(8);
  Choices choices;
  choices.from = &empty;
  for (int trial = 0; trial < 20; ++trial) {
    const QPosteriorProblem problem(choices, random);
    CHECK(run_kernels(problem.args()) == 0);
    for (int64_t n = 0; n < 3; ++n) {
      const int64_t row = row_of(problem.index_of(n), problem.rows);
      CHECK(problem.variance.get({n}) == problem.coefs[4 * row + 2], n);
      CHECK(problem.log_variance.get({n}) == problem.coefs[4 * row + 3], n);
    }
    choices.generated = true;
    const PhiloxNormalProblem normal(choices, random);
    CHECK(run_kernels(normal.args()) == 0);
  }
}

void nan_passes_the_clip() {
  Random random(13);
  for (bool multistep : {false, true}) {
    const NanProblem problem(NanProblem::choices(false), multistep, random);
    CHECK(run_kernels(problem.args()) == 0);
    problem.check_outcome("kernels");
  }
}

void float64_is_refused() {
  Random random(9);
  Choices choices;
  choices.wide = true;
  choices.from = &shapes();
  PhiloxNormalProblem problem(choices, random);
  problem.out = TestTensor(DType::f64, problem.sizes, Layout::contiguous, random);
  CHECK(run_kernels(problem.args()) == kInvalidValue);
}

void a_source_with_terms_that_keep_something_is_refused() {
  Random random(10);
  Choices choices;
  ReverseStepProblem problem(choices, random);
  while (!problem.source.exists()) problem = ReverseStepProblem(choices, random);
  const ReverseStepArgs args = problem.args();
  CHECK(run_kernels(args) == 0);
  const int64_t rng_state[3] = {};
  ReverseStepArgs makes_noise = args, makes_input = args;
  makes_noise.rng.state = rng_state;
  makes_input.model_input = args.x;
  for (const ReverseStepArgs& bad : {makes_noise, makes_input}) {
    CHECK(run_kernels(bad) == kInvalidValue);
  }
  for (int64_t flag = 1; flag < kKnownFlags; flag *= 2) {
    ReverseStepArgs bad = args;
    bad.flags |= flag;
    if (!(flag & kFunctionalFlags)) CHECK(run_kernels(bad) == kInvalidValue, flag);
  }
}

// Every Vec4 of every sample has exactly one thread, for any number of samples.
template <class Mapping>
void check_mapping(int64_t samples, int64_t elements, int vec4s_of_a_thread) {
  const Grid grid = make_grid(samples, elements);
  const Blocks blocks = Mapping::blocks(grid);
  CHECK(blocks.y <= 65535 && blocks.z <= 65535, blocks.y, blocks.z);
  std::vector<uint8_t> seen(static_cast<size_t>(samples * vec4s_of(elements)), 0);
  for (uint32_t z = 0; z < blocks.z; ++z) {
    for (uint32_t y = 0; y < blocks.y; ++y) {
      for (uint32_t x = 0; x < blocks.x; ++x) {
        for (uint32_t thread = 0; thread < kThreads; ++thread) {
          const Position position =
              Mapping::position(grid, {x, y, z, static_cast<uint32_t>(blocks.y)}, thread);
          if (position.sample >= samples) continue;
          for (int i = 0; i < vec4s_of_a_thread; ++i) {
            if (!grid.has(position, i)) continue;
            ++seen[static_cast<size_t>(position.sample * grid.vec4s + position.vec4(i))];
          }
        }
      }
    }
  }
  CHECK(std::all_of(seen.begin(), seen.end(), [](uint8_t n) { return n == 1; }), samples, elements);
}

void every_vec4_has_one_thread() {
  using Vectors = BlocksFor<VectorizedTensor>;
  check_mapping<Vectors>(3, 512, 2);
  check_mapping<Vectors>(2, 1028, 2);
  check_mapping<Vectors>(65535, 16, 2);
  check_mapping<Vectors>(65537, 16, 2);
  check_mapping<Flat>(3, 7, 1);
  check_mapping<Flat>(200001, 5, 1);
  // Beyond 2^31 elements: only the threads of the last block.
  const int64_t elements = (int64_t{1} << 33) + 4;
  const Grid large = make_grid(70000, elements);
  const Blocks blocks = Vectors::blocks(large);
  const uint32_t last_x = static_cast<uint32_t>(blocks.x - 1);
  const Position end = Vectors::position(large, {last_x, 4464, 1, 65535}, 0);
  CHECK(end.sample == 69999, end.sample);
  CHECK(end.vec4(0) == elements / 4 - 1 && large.has(end, 0) && !large.has(end, 1), end.vec4(0));
  const Grid tiny = make_grid(int64_t{1} << 36, 5);
  const Position far = Flat::position(tiny, {0x7FFFFFFF, 0, 0, 1}, 127);
  CHECK(far.sample == (int64_t{1} << 37) - 1 && far.first == 1, far.sample, far.first);
}

View float_view(float* data, int64_t sample_stride, std::initializer_list<int64_t> sizes,
                std::initializer_list<int64_t> strides) {
  View view{};
  view.data = data;
  view.dtype = DType::f32;
  view.sample_stride = sample_stride;
  view.ndim = static_cast<int32_t>(sizes.size());
  std::copy(sizes.begin(), sizes.end(), view.sizes);
  std::copy(strides.begin(), strides.end(), view.strides);
  view.linear = view.ndim == 1 && view.strides[0] == 1;
  return view;
}

constexpr int64_t kFar = (int64_t{1} << 31) + 64;  // elements; beyond 2^33 bytes

// Samples, and elements of a sample, with a distance of more than 2^31 elements.
void offsets_beyond_2_31() {
  const Sparse cpu(4 * 4 * kFar), threads(4 * 4 * kFar);
  if (!cpu.exists() || !threads.exists()) {
    std::printf("not run: offsets_beyond_2_31 needs 69 GB of address space\n");
    return;
  }
  const int64_t rng_state[3] = {1, 2, 3};
  const auto compare = [&](const View& view, int64_t elements) {
    PhiloxNormalArgs args{2, elements, view, {rng_state}};
    args.out.data = cpu.floats();
    cpu_kernels().philox_normal(args, 0, 2 * blocks_per_sample(elements));
    args.out.data = threads.floats();
    CHECK(run_kernels(args) == 0);
    for (int64_t n = 0; n < 2; ++n) {
      for (int64_t e = 0; e < elements; ++e) {
        const int64_t at = n * view.sample_stride + offset_in_sample(view, e);
        CHECK(bits_of(threads.floats()[at]) == bits_of(cpu.floats()[at]), n, e);
        CHECK(threads.floats()[at] != 0.0f, n, e);
      }
    }
  };
  compare(float_view(nullptr, kFar, {512}, {1}), 512);
  compare(float_view(nullptr, kFar, {7, 3}, {1, kFar / 2 + 1}), 21);
  compare(float_view(nullptr, 40, {3, 5}, {kFar, 2}), 15);
}

// The last elements of a sample with more than 2^31 elements.
void elements_beyond_2_31() {
  const int64_t elements = kFar + 4;
  const Sparse cpu(4 * elements), threads(4 * elements);
  if (!cpu.exists() || !threads.exists()) {
    std::printf("not run: elements_beyond_2_31 needs 17 GB of address space\n");
    return;
  }
  const int64_t rng_state[3] = {1, 2, 3};
  PhiloxNormalArgs args{
      1, elements, float_view(cpu.floats(), elements, {elements}, {1}), {rng_state}};
  const int64_t work = blocks_per_sample(elements);
  cpu_kernels().philox_normal(args, work - 1, work);
  args.out.data = threads.floats();
  const int status = dispatch(args, [](auto variant, const auto& params) {
    using Variant = decltype(variant);
    const int64_t blocks = Variant::Blocks::blocks(params.grid).x;
    for (uint32_t thread = 0; thread < kThreads; ++thread) {
      run_thread<Variant>(params, {static_cast<uint32_t>(blocks - 1), 0, 0, 1}, thread);
    }
    return 0;
  });
  CHECK(status == 0);
  for (int64_t e = kFar; e < elements; ++e) {
    CHECK(bits_of(threads.floats()[e]) == bits_of(cpu.floats()[e]), e);
    CHECK(threads.floats()[e] != 0.0f, e);
  }
}

}  // namespace
}  // namespace ddpm::test

int main() {
  using namespace ddpm::test;
  return run(q_sample_same_as_cpu, q_posterior_same_as_cpu, reverse_step_same_as_cpu,
             vectorized_step_terms_same_as_cpu, philox_normal_same_as_cpu,
             empty_samples_have_a_variance, nan_passes_the_clip, float64_is_refused,
             a_source_with_terms_that_keep_something_is_refused, every_vec4_has_one_thread,
             offsets_beyond_2_31, elements_beyond_2_31);
}
