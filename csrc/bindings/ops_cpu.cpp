// The operators on the CPU. Blocks of elements are distributed over torch's thread pool.
#include <memory>
#include <string>

#include "bindings/checksum_op.h"
#include "bindings/network_ops.h"
#include "cpu/instruction_sets.h"
#include "cpu/kernels.h"

namespace ddpm {
namespace {

// Minimum number of blocks per task. Starting a task costs about as much as generating one block of
// noise, or as several blocks whose noise is an input.
constexpr int64_t kGrainNoiseInput = 16;
constexpr int64_t kGrainNoiseGenerated = 2;
// Words of a unit of work of the checksum: 256 KiB. Most tensors of a small network are one unit.
constexpr int64_t kWordsOfPart = 32768;
constexpr int64_t kGrainChecksum = 16;

template <class Args>
void over_blocks(void (*kernel)(const Args&, int64_t, int64_t), const Args& a, int64_t grain) {
  torch::stable::parallel_for(0, a.samples * blocks_per_sample(a.elements), grain,
                              [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

void check_timesteps(const int64_t* t, int64_t stride, int64_t samples, int64_t num_timesteps) {
  for (int64_t n = 0; n < samples; ++n) {
    STD_TORCH_CHECK(t[n * stride] >= 0 && t[n * stride] < num_timesteps, "t must lie in [0, ",
                    num_timesteps, "); got ", t[n * stride]);
  }
}

struct CpuLaunch {
  static void q_sample(const QSampleArgs& a, const Tensor&) {
    check_timesteps(a.t, a.t_stride, a.samples, a.num_timesteps);
    over_blocks(cpu_kernels().q_sample, a, a.rng.state ? kGrainNoiseGenerated : kGrainNoiseInput);
  }
  static void q_posterior(const QPosteriorArgs& a, const Tensor&) {
    check_timesteps(a.t, a.t_stride, a.samples, a.num_timesteps);
    over_blocks(cpu_kernels().q_posterior, a, kGrainNoiseInput);
  }
  static void reverse_step(const ReverseStepArgs& a, const Tensor&) {
    over_blocks(cpu_kernels().reverse_step, a,
                a.rng.state ? kGrainNoiseGenerated : kGrainNoiseInput);
  }
  static void philox_normal(const PhiloxNormalArgs& a, const Tensor&) {
    over_blocks(cpu_kernels().philox_normal, a, kGrainNoiseGenerated);
  }
  static void group_norm(const GroupNormArgs& a, const Tensor&) {
    constexpr size_t kLine = 64;
    const NormSlabs slabs(a);
    const size_t bytes = static_cast<size_t>(slabs.workspace_bytes(a));
    torch::stable::parallel_for(0, a.samples * slabs.per_sample, 1,
                                [&](int64_t begin, int64_t end) {
                                  const std::unique_ptr<char[]> memory(new char[bytes + kLine]);
                                  void* workspace = memory.get();
                                  size_t space = bytes + kLine;
                                  std::align(kLine, bytes, workspace, space);
                                  cpu_kernels().group_norm(a, begin, end, workspace);
                                });
  }
  static void checksum(const std::vector<ChecksumArgs>& tensors, Checksum* sums, const Tensor&) {
    struct Part {
      size_t tensor;
      int64_t begin, end;
      Checksum checksum;
    };
    std::vector<Part> parts;
    parts.reserve(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
      const int64_t words = tensors[i].words();
      for (int64_t begin = 0; begin < words; begin += kWordsOfPart) {
        parts.push_back({i, begin, std::min(begin + kWordsOfPart, words), {}});
      }
    }
    const auto kernel = cpu_kernels().checksum;
    torch::stable::parallel_for(
        0, static_cast<int64_t>(parts.size()), kGrainChecksum, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            Part& part = parts[static_cast<size_t>(i)];
            part.checksum = kernel(tensors[part.tensor], part.begin, part.end);
          }
        });
    for (const Part& part : parts) {
      sums[part.tensor].sum += part.checksum.sum;
      sums[part.tensor].product += part.checksum.product;
    }
  }
};

// Selects the instruction set ("baseline", "avx2", "avx512" or "auto"; "" keeps the current one)
// and returns the name of the one in use.
std::string use_cpu_kernels(std::string name) {
  STD_TORCH_CHECK(name.empty() || select_cpu_kernels(name.c_str()), "name must be auto or one of ",
                  runnable_instruction_sets(), "; got '", name, "'");
  return cpu_kernels().name;
}

}  // namespace
}  // namespace ddpm

STABLE_TORCH_LIBRARY_IMPL(ddpm_fast, CPU, library) {
  ddpm::Ops<ddpm::CpuLaunch>::add_to(library);
  ddpm::NetworkOps<ddpm::CpuLaunch>::add_to(library);
  ddpm::ChecksumOp<ddpm::CpuLaunch>::add_to(library);
}

STABLE_TORCH_LIBRARY_IMPL(ddpm_fast, CompositeExplicitAutograd, library) {
  library.impl("use_cpu_kernels", TORCH_BOX(&ddpm::use_cpu_kernels));
}
